"""Losses that look at more than one image at a time are found out."""

from __future__ import annotations

import pytest
import torch

from orchestrator.errors import PrivacyRefusal
from orchestrator.privacy.coupling import refuse_coupled
from orchestrator.privacy.dissimilarity import Dissimilarity, DissimilarityConfig


def by_itself(x):
    return x.square().mean(1).exp().clamp(max=10).mean()


COUPLED = {
    "normalised by the batch": lambda x: ((x - x.mean(0)) / x.std(0)).square().tanh().sum(1).mean(),
    "a range over the batch, detached": lambda x: (x / x.detach().abs().max()).sin().sum(1).mean(),
    "contrastive": lambda x: torch.cdist(x, x).mean(),
    "a sum, not a mean": lambda x: x.square().sum(),
    "distance correlation": lambda x: (x @ x.T).square().mean(),
}


def test_a_mean_over_images_taken_by_themselves_passes():
    refuse_coupled("the loss", by_itself, (7,))


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_over_the_batch_is_refused(name):
    with pytest.raises(PrivacyRefusal, match=r"the loss of the test.*changes with the others in its batch"):
        refuse_coupled("the loss of the test", COUPLED[name], (7,))


@pytest.mark.parametrize("similarity", ["ssim", "ms_ssim"])
@pytest.mark.parametrize("mode", ["raw", "abs", "square", "relu"])
@pytest.mark.parametrize("values", ["pair", "255"])
def test_the_dissimilarity_term_compares_features_of_one_image_only(similarity, mode, values):
    config = DissimilarityConfig(omega=1.0, similarity=similarity, similarity_mode=mode, similarity_range=values)
    term = Dissimilarity(config)
    refuse_coupled("it", lambda z: term({"a": z[:, 0], "b": z[:, 1]}, fixed=frozenset()).loss, (2, 3, 16, 16))
