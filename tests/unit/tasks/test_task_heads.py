import pytest
import torch

from tasks.errors import UnknownNameError
from tasks.heads import output_layer
from tasks.spec import TaskSpec


def spec(**changes):
    return TaskSpec(**{"name": "pose", "target": "pose", "classes": ("left", "right", "up")} | changes)


def test_a_classifier_answers_one_logit_per_class():
    layer = output_layer(spec(), 7)
    assert layer(torch.zeros(2, 7)).shape == (2, 3)
    assert sum(p.numel() for p in layer.parameters()) == 7 * 3 + 3


def test_the_weights_follow_the_callers_seed():
    def weights(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return output_layer(spec(), 7).weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_an_unknown_head_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"no head named 'segmenter'; known: classifier"):
        output_layer(spec(head="segmenter"), 7)
