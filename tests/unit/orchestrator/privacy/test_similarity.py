from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_msssim import ms_ssim, ssim

from orchestrator.privacy.similarity import Measure, choose_measure, clamped_power, pairs, pairwise_similarity


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def to_unit_range(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both features of each example, shifted and scaled by the pair's minimum and range, which get no gradient."""
    both = torch.stack([a, b]).detach()
    low, high = both.amin((0, 2, 3, 4)), both.amax((0, 2, 3, 4))
    low, span = low[:, None, None, None], (high - low)[:, None, None, None]
    return (a - low) / span, (b - low) / span


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (32, 32, "ssim, window 11"),
        (16, 16, "ssim, window 11"),
        (8, 8, "ssim, window 7"),
        (5, 20, "ssim, window 5"),
        (4, 4, "ssim, window 3"),
        (3, 3, "ssim, window 3"),
        (2, 2, "cosine of centred channel vectors"),
        (2, 40, "cosine of centred channel vectors"),
        (1, 1, "cosine of centred channel vectors"),
    ],
)
def test_ssim_takes_the_largest_odd_window_up_to_11_that_fits(height, width, expected):
    assert str(choose_measure("ssim", height, width)) == expected


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (400, "ms_ssim, window 11, 5 levels"),
        (176, "ms_ssim, window 11, 5 levels"),
        (175, "ms_ssim, window 9, 5 levels"),
        (64, "ms_ssim, window 3, 5 levels"),
        (47, "ms_ssim, window 3, 4 levels"),
        (16, "ms_ssim, window 3, 3 levels"),
        (8, "ms_ssim, window 3, 2 levels"),
        (6, "ms_ssim, window 3, 2 levels"),
        (5, "ssim, window 5"),
        (4, "ssim, window 3"),
        (2, "cosine of centred channel vectors"),
        (1, "cosine of centred channel vectors"),
    ],
)
def test_ms_ssim_takes_as_many_levels_as_fit_and_falls_back_to_ssim(side, expected):
    assert str(choose_measure("ms_ssim", side, side)) == expected


@pytest.mark.parametrize("name", ["ssim", "ms_ssim"])
def test_whatever_is_chosen_fits_the_map_at_its_coarsest_level(name):
    for side in range(1, 400):
        measure = choose_measure(name, side, side + 3)
        assert measure.name == "cosine" or side // 2 ** (measure.levels - 1) >= measure.window >= 3, side


@pytest.mark.parametrize(("side", "window"), [(16, 11), (32, 11), (16, 5), (12, 7), (11, 11)])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_ssim_and_its_gradient_are_those_of_pytorch_msssim_where_that_is_right(side, window, scale):
    a = (scale * (rand(3, 4, side, side) - 0.3)).requires_grad_()
    b = (scale * (rand(3, 4, side, side, seed=1) + rand(3, 4, side, side))).requires_grad_()
    x, y = to_unit_range(a, b)
    theirs = ssim(x, y, data_range=1.0, size_average=False, win_size=window, win_sigma=1.5 * window / 11)
    ours = pairwise_similarity([a, b], measure=Measure(name="ssim", window=window))[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    weights = rand(3, seed=2)
    expected = torch.autograd.grad((theirs * weights).sum(), [a, b])
    got = torch.autograd.grad((ours * weights).sum(), [a, b])
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-5 * float(e.abs().max()))


def test_the_legacy_range_is_the_library_s_default():
    a, b = 3 * rand(2, 4, 16, 16), 3 * rand(2, 4, 16, 16, seed=1)
    ours = pairwise_similarity([a, b], measure=Measure(name="ssim", window=11), value_range="255")[0]
    torch.testing.assert_close(ours, ssim(a, b, size_average=False), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(176, 176), (192, 208)])
def test_ms_ssim_and_its_gradient_are_those_of_pytorch_msssim_on_maps_large_enough(height, width):
    coarse = rand(2, 2, height // 16, width // 16, seed=3).repeat_interleave(16, 2).repeat_interleave(16, 3)
    a = (rand(2, 2, height, width) + coarse).requires_grad_()
    b = (rand(2, 2, height, width, seed=1) + 2 * a.detach() + coarse).requires_grad_()
    x, y = to_unit_range(a, b)
    theirs = ms_ssim(x, y, data_range=1.0, size_average=False)
    ours = pairwise_similarity([a, b], measure=choose_measure("ms_ssim", height, width))[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    expected = torch.autograd.grad(theirs.sum(), [a, b])
    for g, e in zip(torch.autograd.grad(ours.sum(), [a, b]), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-4 * float(e.abs().max()))


def test_ms_ssim_on_a_small_map_is_the_product_of_its_levels():
    """16x16: contrast at 16x16 and 8x8, SSIM at 4x4, the first three weights sharing that of all five."""
    a, b = rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1) + rand(2, 3, 16, 16)
    x, y = to_unit_range(a, b)
    weights = np.array([0.0448, 0.2856, 0.3001])
    product = torch.ones(2, 3, dtype=torch.float64)
    for level, weight in enumerate(weights * 1.0001 / weights.sum()):
        if level:
            x, y = (z.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)) for z in (x, y))
        product *= ssim_per_channel(x, y, contrast_only=level < 2).clamp_min(0) ** weight
    ours = pairwise_similarity([a, b], measure=choose_measure("ms_ssim", 16, 16))[0]
    torch.testing.assert_close(ours, product.mean(1), rtol=0, atol=1e-5)


def ssim_per_channel(x: torch.Tensor, y: torch.Tensor, *, contrast_only: bool) -> torch.Tensor:
    from pytorch_msssim.ssim import _fspecial_gauss_1d, _ssim

    window = _fspecial_gauss_1d(3, 1.5 * 3 / 11).repeat(x.shape[1], 1, 1, 1)
    similarity, contrast = _ssim(x, y, data_range=1.0, win=window)
    return contrast if contrast_only else similarity


def test_the_derivative_of_a_scale_s_power_is_bounded():
    x = torch.tensor([-1.0, 0.0, 1e-30, 1e-7, 2e-6, 0.5], dtype=torch.float64).requires_grad_()
    y = clamped_power(x, 0.3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    expected = [0.0, 0.0, 0.0, 0.0, 2e-6**0.3, 0.5**0.3]
    np.testing.assert_allclose(y.detach(), expected)
    np.testing.assert_allclose(gradient, [0.3 * v / u if v else 0.0 for v, u in zip(expected, x.tolist(), strict=True)])


def test_ms_ssim_of_opposites_is_zero_with_a_zero_gradient_and_not_nan():
    """A fractional power has no derivative at 0, where the contrast of opposites is clamped to."""
    a = (rand(2, 3, 16, 16) - 0.5).requires_grad_()
    similarity = pairwise_similarity([a, -a.detach()], measure=choose_measure("ms_ssim", 16, 16))
    assert similarity.tolist() == [[0.0, 0.0]]
    (gradient,) = torch.autograd.grad(similarity.sum(), a)
    assert not gradient.any()


@pytest.mark.parametrize("name", ["ssim", "ms_ssim"])
@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_a_number_that_is_not_finite_comes_through(name, side):
    a, b = rand(2, 3, side, side), rand(2, 3, side, side, seed=1)
    a[1, 0, 0, 0] = torch.nan
    similarity = pairwise_similarity([a, b], measure=choose_measure(name, side, side))[0]
    assert torch.isfinite(similarity[0])
    assert torch.isnan(similarity[1])


def test_on_one_position_the_cosine_is_pearson_s_correlation_over_the_channels():
    a, b = rand(4, 10, 1, 1), rand(4, 10, 1, 1, seed=1)
    ours = pairwise_similarity([a, b], measure=choose_measure("ssim", 1, 1))[0]
    expected = [np.corrcoef(a[i].flatten(), b[i].flatten())[0, 1] for i in range(4)]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_on_few_positions_the_cosine_is_averaged_over_them():
    a, b = rand(2, 10, 2, 2), rand(2, 10, 2, 2, seed=1)
    ours = pairwise_similarity([a, b], measure=choose_measure("ssim", 2, 2))[0]
    at = [pairwise_similarity([a[..., y, x, None, None], b[..., y, x, None, None]], measure=Measure(name="cosine"))[0]
          for y in range(2) for x in range(2)]  # fmt: skip
    torch.testing.assert_close(ours, torch.stack(at).mean(0))


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["ssim", "ms_ssim"])
def test_a_row_of_many_pairs_is_the_pair_alone(name, side):
    features = [rand(2, 6, side, side, seed=t) for t in range(5)]
    measure = choose_measure(name, side, side)
    together = pairwise_similarity(features, measure=measure, n_free=3)
    index = pairs(5, 3)
    assert index == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4)]
    for row, (i, j) in zip(together, index, strict=True):
        alone = pairwise_similarity([features[j], features[i]], measure=measure)[0]
        torch.testing.assert_close(row, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ssim", "ms_ssim"])
@pytest.mark.parametrize("side", [1, 3, 8, 16])
def test_identical_features_have_similarity_one_and_scale_does_not_matter(name, side):
    a, b = rand(3, 8, side, side), rand(3, 8, side, side, seed=1)
    measure = choose_measure(name, side, side)
    torch.testing.assert_close(pairwise_similarity([a, a], measure=measure)[0], torch.ones(3).double())
    value = pairwise_similarity([a, b], measure=measure)
    assert float(value.max()) < 0.9
    torch.testing.assert_close(pairwise_similarity([40 * a - 7, 40 * b - 7], measure=measure), value)


@pytest.mark.parametrize("side", [1, 2, 8, 16])
@pytest.mark.parametrize("name", ["ssim", "ms_ssim"])
@pytest.mark.parametrize("level", [0.0, 5.0])
def test_constant_features_give_finite_values_and_gradients(name, side, level):
    dead = torch.full((2, 4, side, side), level).requires_grad_()
    live = rand(2, 4, side, side).float().requires_grad_()
    for features in ([dead, live], [dead, dead.detach()], [dead, torch.full_like(live, level + 1e-6)]):
        value = pairwise_similarity(features, measure=choose_measure(name, side, side))
        (gradient,) = torch.autograd.grad(value.square().sum(), dead)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()


def test_half_precision_features_are_compared_in_single_precision():
    a, b = rand(2, 4, 8, 8).half(), rand(2, 4, 8, 8, seed=1).half()
    measure = choose_measure("ssim", 8, 8)
    assert torch.equal(
        pairwise_similarity([a, b], measure=measure), pairwise_similarity([a.float(), b.float()], measure=measure)
    )
