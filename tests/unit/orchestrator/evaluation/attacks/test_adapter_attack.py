import dataclasses

import numpy as np
import pytest
import torch
from hidden_labels import attack_input, noise
from torch import nn

from orchestrator.evaluation.attacks.adapter import Adapter, AdapterAttack
from orchestrator.evaluation.attacks.base import NotApplicable, TenantHead, attack_once
from orchestrator.evaluation.attacks.swap import accuracy, head_logits

QUICK = AdapterAttack(epochs=1, min_steps=150)
N_CODES = 6


class Codes(nn.Module):
    """A head that knows a code: the product of six signs, which no fresh attacker would guess."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, z):
        parity = torch.prod(torch.tanh(2 * z.mean(dim=(2, 3))[:, :N_CODES]), dim=1)
        return self.scale * torch.stack([-parity, parity], dim=1)


def coded(order):
    """Six random signs whose product is the label, in permuted channels among eight."""

    def make(rng, y):
        signs = rng.choice([-1, 1], size=(len(y), 8))
        signs[:, 0] *= np.where(signs[:, :N_CODES].prod(axis=1) == 2 * y - 1, 1, -1)
        return signs[:, order, None, None] + 0.1 * rng.normal(size=(len(y), 8, 2, 2))

    return make


def head_of(module, *shape):
    return TenantHead(module=module, feature_shape=shape)


def linear_head(*, channels=8, n_classes=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, n_classes))


def one_hot(order):
    """The class is the largest channel, in permuted channels."""
    return lambda rng, y: 2 * np.eye(8)[y][:, order, None, None] + 0.3 * rng.normal(size=(len(y), 8, 2, 2))


def reading(order):
    """A head that reads the classes off the first channels."""
    head = linear_head()
    with torch.no_grad():
        head[2].weight.copy_(4 * torch.eye(4, 8))
        head[2].bias.zero_()
    return head


def test_a_permutation_of_the_channels_that_fools_the_swap_test_is_undone():
    order = np.roll(np.arange(8), 3)
    given = attack_input(one_hot(order), n_classes=4, head=head_of(reading(order), 8, 2, 2))
    swapped = accuracy(head_logits(given.head.module, given.test_z).argmax(axis=1), given.test_y)
    assert swapped < 0.35
    assert QUICK.run(given).accuracy > 0.95


def test_what_the_head_knows_and_a_few_rows_do_not_teach_is_read():
    from orchestrator.evaluation.attacks.cnn import CnnAttack
    from orchestrator.evaluation.attacks.linear import LinearAttack

    order = np.arange(8)
    given = attack_input(coded(order), n=(60, 40, 300), head=head_of(Codes(), 8, 2, 2))
    assert QUICK.run(given).accuracy > 0.95
    assert LinearAttack().run(given).accuracy < 0.65
    assert CnnAttack(width=16, epochs=1, min_steps=150).run(given).accuracy < 0.75


def test_noise_is_read_at_chance():
    head = head_of(linear_head(n_classes=2), 8, 2, 2)
    result = QUICK.run(attack_input(noise(8, 2, 2), n=(300, 80, 2000), head=head))
    assert abs(result.accuracy - 0.5) < 0.04


def test_the_head_and_the_process_are_left_as_they_were():
    given = attack_input(one_hot(np.arange(8)), n=(40, 20, 20), n_classes=4, head=head_of(linear_head(), 8, 2, 2))
    before = {name: value.clone() for name, value in given.head.module.state_dict().items()}
    state = torch.get_rng_state()
    quick = dataclasses.replace(QUICK, min_steps=10)
    first, again = (dataclasses.replace(quick.run(given), seconds=0) for _ in range(2))
    assert first == again
    assert all(torch.equal(value, before[name]) for name, value in given.head.module.state_dict().items())
    assert all(p.requires_grad for p in given.head.module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_head_the_attack_is_skipped_and_not_crashed():
    given = attack_input(noise(8, 2, 2), n=(20, 10, 10))
    with pytest.raises(NotApplicable):
        QUICK.run(given)
    result = attack_once(QUICK, lambda: given, seed=0)
    assert (result.crashed, result.skipped) == (None, "there is no head of the target's tenant")
    assert not result.completed


def test_the_adapter_begins_as_the_identity():
    z = torch.randn(3, 8, 2, 2)
    assert torch.equal(Adapter((8, 2, 2), (8, 2, 2))(z), z)


@pytest.mark.parametrize("given", [(8, 4, 4), (4, 2, 2), (12, 1, 1)])
@pytest.mark.parametrize("wanted", [(8, 2, 2), (8, 4, 4), (5,)])
def test_the_adapter_gives_what_the_head_takes(given, wanted):
    assert Adapter(given, wanted)(torch.randn(2, *given)).shape == (2, *wanted)
