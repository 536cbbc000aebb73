import dataclasses

import numpy as np
import pytest
import torch
from squares import mixed

from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.evaluation.reconstruction.base import pixels
from orchestrator.evaluation.reconstruction.metrics import compare
from orchestrator.evaluation.reconstruction.trained import TrainedDecoder

SMALL = TrainedDecoder(width=8, epochs=1, min_steps=200, checks=3, batch_size=16, loss="mse")


def score(attack, data):
    return compare(attack.run(data), pixels(data.test_x))


@pytest.mark.parametrize(
    ("kind", "loss", "at_least"),
    [("pixel_shuffle", "mse_ssim", 30), ("staged", "l1", 28)],
)
def test_an_invertible_map_is_inverted_nearly_exactly(world, kind, loss, at_least):
    scores = score(dataclasses.replace(SMALL, kind=kind, loss=loss, min_steps=400), world(mixed))
    assert scores.psnr > at_least
    assert scores.ssim > 0.95


def test_the_paper_s_kind_of_decoder_is_the_weaker_attacker(world):
    data = world(mixed)
    paper = dataclasses.replace(SMALL, kind="transposed", standardise=False)
    assert score(paper, data).psnr + 5 < score(SMALL, data).psnr


@pytest.mark.parametrize("loss", ["mse", "mse_ssim"])
def test_a_feature_that_is_constant_gives_the_mean_image(world, loss):
    data = world(lambda x: np.ones((len(x), 4, 4, 4), dtype=np.float32))
    images = dataclasses.replace(SMALL, loss=loss).run(data)
    mean = pixels(data.train_x).mean(dim=0)
    assert (images - mean).abs().mean() < 0.03
    assert compare(images, pixels(data.test_x)).ssim < compare(mean.expand_as(images), pixels(data.test_x)).ssim + 0.03


def test_a_feature_of_pure_noise_is_no_better_than_the_mean_image(world):
    rng = np.random.default_rng(0)
    data = world(lambda x: rng.normal(size=(len(x), 8, 4, 4)).astype(np.float32))
    mean = pixels(data.train_x).mean(dim=0).expand(len(data.test_x), -1, -1, -1)
    assert score(SMALL, data).ssim < compare(mean, pixels(data.test_x)).ssim + 0.02


def test_the_scale_and_offset_of_a_feature_hide_nothing(world):
    data = world(lambda x: 1e-4 * mixed(x) + 50)
    assert score(SMALL, data).psnr > score(SMALL, world(mixed)).psnr - 2


def test_a_vector_is_a_feature_too(world):
    data = world(lambda x: pixels(x).mean(dim=(2, 3)).numpy(), n=(60, 20, 20))
    assert SMALL.run(data).shape == (20, 3, 16, 16)


def test_the_seed_decides_everything_and_the_process_keeps_its_own_randomness(world):
    quick, data = dataclasses.replace(SMALL, min_steps=20), world(mixed, n=(60, 20, 20))
    before = torch.get_rng_state()
    first, again = quick.run(data), quick.run(data)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, quick.run(dataclasses.replace(data, seed=1)))


def test_answers_are_pixels(world):
    images = dataclasses.replace(SMALL, min_steps=20).run(world(mixed, n=(60, 20, 20)))
    assert images.min() >= 0 and images.max() <= 1


def test_an_attacker_that_diverges_says_so(world):
    with pytest.raises(FloatingPointError, match="diverged"):
        dataclasses.replace(SMALL, learning_rate=1e30, min_steps=20, loss="mse").run(world(mixed, n=(60, 20, 20)))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"kind": "gan"}, UnknownNameError, "staged"),
        ({"loss": "lpips"}, UnknownNameError, "mse_ssim"),
        ({"min_steps": 0}, ConfigError, "above 0"),
    ],
)
def test_settings_that_make_no_attacker_are_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        TrainedDecoder(**wrong)
