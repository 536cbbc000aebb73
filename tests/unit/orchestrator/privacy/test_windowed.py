from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.privacy import windowed
from orchestrator.privacy.windowed import Smoothing, windowed_ssim

K1, K2 = 0.01, 0.03


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(window: int) -> np.ndarray:
    offsets = np.arange(window) - window // 2
    weights = np.exp(-(offsets**2) / (2 * (1.5 * window / 11) ** 2))
    return np.outer(weights, weights) / weights.sum() ** 2


def ssim_by_hand(a: np.ndarray, b: np.ndarray, *, window: int, low: float, span: float) -> tuple[float, float]:
    """Equation 13 of Wang et al. 2004 for two (H, W) maps, window by window: SSIM and its contrast factor."""
    g, similarity, contrast = gaussian(window), [], []
    a, b = (a - low) / span, (b - low) / span
    for y in range(a.shape[0] - window + 1):
        for x in range(a.shape[1] - window + 1):
            p, q = a[y : y + window, x : x + window], b[y : y + window, x : x + window]
            m, n = (g * p).sum(), (g * q).sum()
            v, w, c = (g * (p - m) ** 2).sum(), (g * (q - n) ** 2).sum(), (g * (p - m) * (q - n)).sum()
            contrast.append((2 * c + K2**2) / (v + w + K2**2))
            similarity.append((2 * m * n + K1**2) / (m**2 + n**2 + K1**2) * contrast[-1])
    return float(np.mean(similarity)), float(np.mean(contrast))


@pytest.mark.parametrize(("height", "width", "window"), [(3, 3, 3), (8, 8, 7), (5, 9, 5), (13, 12, 11)])
def test_every_pair_channel_and_example_is_what_the_definition_gives(height, width, window):
    maps = [randn(2, 2, height, width, seed=t) + t for t in range(3)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    low = torch.tensor([[-3.0, -2.0], [-4.0, -1.0], [0.5, 0.0]], dtype=torch.float64)
    span = torch.tensor([[5.0, 6.0], [2.0, 9.0], [7.0, 3.0]], dtype=torch.float64)
    similarity, contrast = windowed_ssim(maps, pairs, window, low, span)
    for k, (i, j) in enumerate(pairs):
        for b in range(2):
            for c in range(2):
                expected = ssim_by_hand(
                    maps[i][b, c].numpy(),
                    maps[j][b, c].numpy(),
                    window=window,
                    low=float(low[k, b]),
                    span=float(span[k, b]),
                )
                np.testing.assert_allclose((similarity[k, b, c], contrast[k, b, c]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("height", "width", "window"), [(4, 5, 3), (7, 7, 7)])
def test_the_gradient_of_both_answers_is_right(height, width, window):
    low, span = torch.tensor([[-3.0], [-2.0]]).double(), torch.tensor([[5.0], [4.0]]).double()
    maps = [randn(1, 2, height, width, seed=t).requires_grad_() for t in range(3)]

    def both(*maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return windowed_ssim(maps, [(0, 1), (1, 2)], window, low, span)

    assert torch.autograd.gradcheck(both, maps)
    fixed = maps[2].detach()
    assert torch.autograd.gradcheck(lambda a, b: both(a, b, fixed), maps[:2])


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 12, 40)])
def test_smoothing_is_a_valid_convolution_and_spreading_its_adjoint(shape):
    window = 7
    c, h, w = shape
    x, kernel = randn(2, c, h, w), torch.from_numpy(gaussian(window))
    expected = torch.nn.functional.conv2d(x, kernel.expand(c, 1, window, window), groups=c)
    smoothing = Smoothing.of(x, window)
    means = smoothing.means(x.permute(2, 3, 0, 1))
    torch.testing.assert_close(means.permute(2, 3, 0, 1), expected, rtol=1e-12, atol=1e-12)
    g = randn(*means.shape, seed=1)
    torch.testing.assert_close((means * g).sum(), (x.permute(2, 3, 0, 1) * smoothing.spread(g)).sum())


@pytest.mark.parametrize("numbers", [1, 2 * 3 * 64, 10**9])
def test_how_many_examples_are_taken_at_once_changes_nothing(monkeypatch, numbers):
    low, span = torch.zeros(3, 5).double() - 4, torch.full((3, 5), 8.0).double()

    def run() -> list[torch.Tensor]:
        maps = [randn(5, 3, 8, 8, seed=t).requires_grad_() for t in range(3)]
        similarity, contrast = windowed_ssim(maps, [(0, 1), (0, 2), (1, 2)], 7, low, span)
        loss = (similarity * randn(3, 5, 3, seed=9) + contrast.square()).sum()
        return [similarity, contrast, *torch.autograd.grad(loss, maps)]

    expected = run()
    monkeypatch.setattr(windowed, "_CHUNK_NUMBERS", numbers)
    for got, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_a_small_variance_beside_a_large_mean_is_not_lost_in_single_precision():
    a, b = randn(2, 3, 8, 8) + 3e3, randn(2, 3, 8, 8, seed=1) + 3e3
    low, span = torch.full((1, 2), 2.99e3), torch.full((1, 2), 20.0)
    exact = windowed_ssim([a, b], [(0, 1)], 7, low.double(), span.double())
    single = windowed_ssim([a.float(), b.float()], [(0, 1)], 7, low, span)
    for got, wanted in zip(single, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-3)


def test_what_a_map_contributes_is_smoothed_once_however_many_pairs_it_is_in(monkeypatch):
    calls = []
    means = Smoothing.means
    monkeypatch.setattr(Smoothing, "means", lambda self, x: calls.append(1) or means(self, x))
    maps = [randn(2, 3, 8, 8, seed=t) for t in range(6)]
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    windowed_ssim(maps, pairs, 7, torch.zeros(15, 2).double(), torch.ones(15, 2).double())
    assert len(calls) == 2 * 6 + 15  # mean and square of each map; the product of each pair


def test_maps_in_another_memory_layout_give_the_same():
    a, b = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1)
    low, span = torch.full((1, 3), -4.0).double(), torch.full((1, 3), 8.0).double()
    expected = windowed_ssim([a, b], [(0, 1)], 7, low, span)[0]
    c = a.to(memory_format=torch.channels_last).requires_grad_()
    got = windowed_ssim([c, b.flip(0).flip(0)], [(0, 1)], 7, low, span)[0]
    torch.testing.assert_close(got, expected)
    a.requires_grad_()
    (wanted,) = torch.autograd.grad(windowed_ssim([a, b], [(0, 1)], 7, low, span)[0].sum(), a)
    (gradient,) = torch.autograd.grad(got.sum(), c)
    torch.testing.assert_close(gradient, wanted)
