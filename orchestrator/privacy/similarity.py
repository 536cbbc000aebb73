"""Structural similarity of feature maps, for every pair of several tasks, example by example.

Axes: T tasks, B examples, C channels, H and W of the map, P positions of a window on it. Features are compared channel
by channel, as MetaMorphosis does. Nothing is ever computed over the batch: no example touches another's value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from torch import Tensor

from orchestrator.errors import ConfigError
from orchestrator.privacy.windowed import windowed_ssim

MeasureName: TypeAlias = Literal["ssim", "ms_ssim"]
RangeName: TypeAlias = Literal["pair", "255"]

MAX_WINDOW: Final = 11
MIN_WINDOW: Final = 3
SCALE_WEIGHTS: Final = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""MS-SSIM (Wang et al. 2003), from the finest scale to the coarsest."""
MIN_RANGE: Final = 1e-4
"""Two features that differ by less than this over their whole maps are constant: the derivative by them is bounded."""
MIN_FACTOR: Final = 1e-6
"""Below it a factor of MS-SSIM counts as 0: the derivative of a fractional power has no bound there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """What is computed on maps of one size."""

    name: Literal["ssim", "ms_ssim", "cosine"]
    window: int = 0
    levels: int = 1

    def __str__(self) -> str:
        if self.name == "cosine":
            return "cosine of centred channel vectors"
        return f"{self.name}, window {self.window}" + (f", {self.levels} levels" if self.levels > 1 else "")


def choose_measure(name: MeasureName, height: int, width: int) -> Measure:
    """What ``name`` comes down to on maps of that size.

    ssim: the window is the largest odd number up to 11 that fits. ms_ssim: the window is the largest up to 11 for which
    five levels fit, or else 3, with as many levels as fit (16x16: three); where that is one, it is ssim. Below 3
    positions a side no window fits, and the channels at each position are compared instead.
    """
    side = min(height, width)
    if side < MIN_WINDOW:
        return Measure(name="cosine")
    if name == "ms_ssim":
        window = max(MIN_WINDOW, _largest_odd(side // 2 ** (len(SCALE_WEIGHTS) - 1)))
        levels = min(len(SCALE_WEIGHTS), int(math.log2(side / window)) + 1)
        if levels > 1:
            return Measure(name="ms_ssim", window=window, levels=levels)
    return Measure(name="ssim", window=_largest_odd(side))


def _largest_odd(limit: int) -> int:
    return min(MAX_WINDOW, limit - 1 + limit % 2)


def pairwise_similarity(
    features: Sequence[Tensor], *, measure: Measure, value_range: RangeName = "pair", n_free: int | None = None
) -> Tensor:
    """(pairs, B): the similarity of every two features that are not both fixed; see `pairs`.

    ``features`` are T maps (B, C, H, W) of one shape; all but the first ``n_free`` are held fixed. Identical features
    have similarity 1.
    """
    n_free = len(features) if n_free is None else n_free
    maps = [_prepared(z, fixed=t >= n_free) for t, z in enumerate(features)]
    if measure.name == "cosine":
        return _cosine(maps, n_free)
    low, span = _ranges(maps, n_free, value_range)
    if measure.name == "ssim":
        return windowed_ssim(maps, pairs(len(maps), n_free), measure.window, low, span)[0].mean(-1)
    return _ms_ssim(maps, n_free, measure, low, span)


def pairs(n_features: int, n_free: int) -> list[tuple[int, int]]:
    """Positions of the pairs, in the order of `pairwise_similarity`'s rows."""
    return [(i, j) for i in range(n_free) for j in range(i + 1, n_features)]


def _prepared(z: Tensor, *, fixed: bool) -> Tensor:
    if not z.is_floating_point():
        raise ConfigError(f"a feature must be a float tensor, got {z.dtype}")
    z = z.detach() if fixed else z
    # Half precision holds no difference of squares.
    return z.float() if z.dtype in {torch.float16, torch.bfloat16} else z


def _ranges(maps: Sequence[Tensor], n_free: int, value_range: RangeName) -> tuple[Tensor, Tensor]:
    """(pairs, B) each: the lowest value, and the width of the range, that SSIM takes for 0 and 1."""
    index = pairs(len(maps), n_free)
    first, second = [i for i, _ in index], [j for _, j in index]
    with torch.no_grad():
        low = torch.stack([z.amin((1, 2, 3)) for z in maps])
        high = torch.stack([z.amax((1, 2, 3)) for z in maps])
        low = torch.minimum(low[first], low[second])
        span = (torch.maximum(high[first], high[second]) - low).clamp_min(MIN_RANGE)
    if value_range == "255":
        return torch.zeros_like(low), torch.full_like(span, 255.0)
    return low, span


def _ms_ssim(maps: list[Tensor], n_free: int, measure: Measure, low: Tensor, span: Tensor) -> Tensor:
    """Contrast at every level but the last, where it is the whole SSIM, each to the power of its scale's weight.

    Fewer levels than five share the weight of all: the published ones sum to 1.0001, and are taken as they are.
    """
    weights = SCALE_WEIGHTS[: measure.levels]
    share = sum(SCALE_WEIGHTS) / sum(weights)
    index = pairs(len(maps), n_free)
    product: Tensor | None = None
    for level, weight in enumerate(weights):
        if level:
            maps = [F.avg_pool2d(z, 2) for z in maps]
        similarity, contrast = windowed_ssim(maps, index, measure.window, low, span)
        factor = clamped_power(similarity if level == measure.levels - 1 else contrast, share * weight)
        product = factor if product is None else product * factor
    assert product is not None
    return product.mean(-1)


def clamped_power(x: Tensor, exponent: float) -> Tensor:
    """``x ** exponent`` where x > `MIN_FACTOR`; elsewhere 0, with the derivative 0. NaN stays NaN."""
    return F.threshold(x, MIN_FACTOR, 0.0) ** exponent


def _cosine(maps: Sequence[Tensor], n_free: int) -> Tensor:
    """Cosine of the channel vectors, each minus its mean over the channels, averaged over the positions."""
    z_TBCP = torch.stack(tuple(maps)).flatten(-2)
    centred = z_TBCP - z_TBCP.mean(2, keepdim=True)
    unit = centred * centred.square().sum(2, keepdim=True).clamp_min(MIN_RANGE**2).rsqrt()
    unit_BTK = unit.flatten(2).transpose(0, 1)
    table_BTT = unit_BTK[:, :n_free] @ unit_BTK.mT / z_TBCP.shape[-1]
    index = pairs(len(maps), n_free)
    return table_BTT[:, [i for i, _ in index], [j for _, j in index]].T
