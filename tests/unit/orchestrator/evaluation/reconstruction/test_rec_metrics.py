import math

import pytest
import torch
from pytorch_msssim import ms_ssim as reference_ms_ssim

from orchestrator.errors import DataError
from orchestrator.evaluation.reconstruction.metrics import (
    MAX_PSNR_DB,
    MS_SSIM_WINDOW,
    compare,
    differentiable_ssim,
    feature_distance,
    ms_ssim,
    psnr,
    ssim,
)
from orchestrator.privacy.similarity import SCALE_WEIGHTS


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def noisy(images, scale=0.1):
    return (images + scale * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


@pytest.mark.parametrize(("difference", "expected"), [(1.0, 0.0), (0.1, 20.0), (0.01, 40.0)])
def test_psnr_is_twenty_decibels_for_every_factor_of_ten_in_the_error(difference, expected):
    x = torch.zeros(2, 3, 16, 16)
    torch.testing.assert_close(psnr(x + difference, x), torch.full((2,), expected), atol=1e-4, rtol=0)


def test_a_copy_has_the_best_value_of_every_measure(images):
    scores = compare(images, images, feature_map=lambda x: x)
    assert (scores.psnr, scores.l1, scores.perceptual_proxy) == (MAX_PSNR_DB, 0.0, 0.0)
    assert scores.ssim == pytest.approx(1.0, abs=1e-6)
    assert scores.ms_ssim == pytest.approx(1.0, abs=1e-6)


def test_ssim_of_two_constant_images_is_the_luminance_term_alone():
    black, grey = torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.5)
    c1 = 0.01**2
    assert ssim(black, grey).item() == pytest.approx(c1 / (0.25 + c1), rel=1e-4)


@pytest.mark.parametrize("side", [64, 32, 16, 8, 5])
def test_both_implementations_of_ssim_agree_at_every_size(side):
    x = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(side))
    torch.testing.assert_close(differentiable_ssim(noisy(x), x), ssim(noisy(x), x), atol=2e-5, rtol=0)


def test_ms_ssim_is_the_reference_with_three_levels_and_a_window_of_seven():
    x = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    weights = [w / sum(SCALE_WEIGHTS[:3]) for w in SCALE_WEIGHTS[:3]]
    expected = reference_ms_ssim(
        noisy(x),
        x,
        data_range=1.0,
        size_average=False,
        win_size=MS_SSIM_WINDOW,
        win_sigma=1.5 * MS_SSIM_WINDOW / 11,
        weights=weights,
    )
    torch.testing.assert_close(ms_ssim(noisy(x), x), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("side", [8, 12, 16, 28])
def test_ms_ssim_takes_small_images_too(side):
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    slight, heavy = ms_ssim(noisy(x, 0.05), x), ms_ssim(noisy(x, 0.5), x)
    assert (heavy < slight).all() and (slight < 1).all()


def test_more_noise_is_worse_by_every_measure(images):
    slight, heavy = (compare(noisy(images, scale), images, feature_map=lambda x: x) for scale in (0.05, 0.4))
    assert slight.psnr > heavy.psnr
    assert slight.ssim > heavy.ssim
    assert slight.ms_ssim > heavy.ms_ssim
    assert slight.l1 < heavy.l1
    assert slight.perceptual_proxy < heavy.perceptual_proxy


def test_feature_distance_is_four_for_opposite_and_two_for_orthogonal_channels():
    first = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    second = torch.tensor([0.0, 7.0]).view(1, 2, 1, 1)
    assert feature_distance(first, -3 * first).item() == pytest.approx(4.0)
    assert feature_distance(first, second).item() == pytest.approx(2.0)


def test_the_interval_of_ssim_narrows_with_the_images_and_one_image_has_none(images):
    few, many = compare(noisy(images), images), compare(noisy(images).repeat(16, 1, 1, 1), images.repeat(16, 1, 1, 1))
    assert few.ssim_low < few.ssim < few.ssim_high
    assert many.ssim_high - many.ssim_low < 0.3 * (few.ssim_high - few.ssim_low)
    alone = compare(noisy(images)[:1], images[:1])
    assert math.isnan(alone.ssim_low)
    assert alone.to_json()["ssim_low"] is None


def test_scores_do_not_depend_on_how_many_images_are_scored_at_a_time(images):
    many, originals = noisy(images).repeat(80, 1, 1, 1), images.repeat(80, 1, 1, 1)
    assert compare(many, originals).ssim == pytest.approx(compare(noisy(images), images).ssim, abs=1e-6)


@pytest.mark.parametrize("spoil", [lambda x: x[:2], lambda x: x * math.nan])
def test_what_is_no_reconstruction_is_refused(images, spoil):
    with pytest.raises(DataError):
        compare(spoil(images), images)
