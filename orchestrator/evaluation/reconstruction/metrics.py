"""How like the original a reconstruction is. Images are (N, 3, S, S) pixels in [0, 1]; one number an image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from torch import Tensor

from orchestrator.errors import DataError
from orchestrator.evaluation.attacks.base import jsonable
from orchestrator.privacy.similarity import MIN_WINDOW, SCALE_WEIGHTS, choose_measure, clamped_power
from orchestrator.privacy.windowed import windowed_ssim

MAX_PSNR_DB = 100.0
"""What an exact copy counts as; JSON has no infinity."""
MS_SSIM_LEVELS, MS_SSIM_WINDOW = 3, 7
_CHUNK = 256

FeatureMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Means over images, with the 95 % interval of the mean of SSIM (normal approximation)."""

    n: int
    psnr: float
    """dB."""
    ssim: float
    ssim_low: float
    ssim_high: float
    ms_ssim: float
    l1: float
    perceptual_proxy: float = math.nan
    """Distance of features in a network that was trained in this run. Not LPIPS, and comparable only within the run."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; NaN becomes null."""
        return {name: jsonable(value) for name, value in asdict(self).items()}


@torch.no_grad()
def compare(images: Tensor, originals: Tensor, *, feature_map: FeatureMap | None = None) -> Scores:
    """Score reconstructions. Raises `DataError` unless both have one shape and are finite."""
    if images.shape != originals.shape or not len(images):
        raise DataError(f"{tuple(images.shape)} reconstructions of {tuple(originals.shape)} images")
    if not torch.isfinite(images).all():
        raise DataError("a reconstruction holds NaN or infinity")
    parts = [
        _measures(images[i : i + _CHUNK], originals[i : i + _CHUNK], feature_map) for i in range(0, len(images), _CHUNK)
    ]
    by_measure = {name: torch.cat([part[name] for part in parts]).double() for name in parts[0]}
    ssims, n = by_measure["ssim"], len(images)
    margin = 1.96 * ssims.std(correction=1).item() / math.sqrt(n) if n > 1 else math.nan
    means = {name: values.mean().item() for name, values in by_measure.items()}
    return Scores(n=n, ssim_low=means["ssim"] - margin, ssim_high=means["ssim"] + margin, **means)


def _measures(images: Tensor, originals: Tensor, feature_map: FeatureMap | None) -> dict[str, Tensor]:
    measured = {
        "psnr": psnr(images, originals),
        "ssim": ssim(images, originals),
        "ms_ssim": ms_ssim(images, originals),
        "l1": (images - originals).abs().mean(dim=(1, 2, 3)),
    }
    if feature_map is not None:
        measured["perceptual_proxy"] = feature_distance(feature_map(images), feature_map(originals))
    return measured


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """(N,) dB, for a data range of 1."""
    mse = (images - originals).square().mean(dim=(1, 2, 3))
    return -10 * mse.clamp_min(10 ** (-MAX_PSNR_DB / 10)).log10()


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """(N,), for a data range of 1 and a window of 11, or the largest odd one that fits into smaller images."""
    from pytorch_msssim import ssim as reference

    window = _window(images, 11)
    value: Tensor = reference(
        images, originals, data_range=1.0, size_average=False, win_size=window, win_sigma=1.5 * window / 11
    )
    return value


def ms_ssim(images: Tensor, originals: Tensor) -> Tensor:
    """(N,), with a window of 7 on three levels, fewer where the coarsest would not hold the window.

    Weights are those of the published five levels, renormalised.
    """
    window = _window(images, MS_SSIM_WINDOW)
    levels = min(MS_SSIM_LEVELS, int(math.log2(min(images.shape[-2:]) / window)) + 1)
    weights = SCALE_WEIGHTS[:levels]
    product = images.new_ones(images.shape[:2])
    for level, weight in enumerate(weights):
        if level:
            images, originals = F.avg_pool2d(images, 2), F.avg_pool2d(originals, 2)
        whole, contrast = _windowed(images, originals, window)
        product = product * clamped_power(whole if level == levels - 1 else contrast, weight / sum(weights))
    return product.mean(dim=1)


def differentiable_ssim(images: Tensor, originals: Tensor) -> Tensor:
    """(N,): `ssim` with a gradient, by the project's own code, which is several times faster on a CPU."""
    return _windowed(images, originals, _window(images, 11))[0].mean(dim=1)


def feature_distance(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """(B,): the squared distance of the unit channel vectors, averaged over the positions. In [0, 4]."""
    first, second = (F.normalize(z, dim=1) for z in (first_BCHW, second_BCHW))
    return (first - second).square().sum(dim=1).mean(dim=(1, 2))


def _windowed(images: Tensor, originals: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """(N, 3) each: SSIM and its contrast factor, for a data range of 1."""
    low = images.new_zeros(1, len(images))
    whole, contrast = windowed_ssim([images, originals], [(0, 1)], window, low, torch.ones_like(low))
    return whole[0], contrast[0]


def _window(images: Tensor, largest: int) -> int:
    side = min(images.shape[-2:])
    if side < MIN_WINDOW:
        raise DataError(f"images of {side} pixels a side are too small for SSIM: it needs at least {MIN_WINDOW}")
    return min(largest, choose_measure("ssim", *images.shape[-2:]).window)
