"""SSIM under a sliding Gaussian window, for many pairs of maps at once.

What a map contributes by itself (its windows' means and variances) is computed once and serves all pairs it is in; a
pair costs one product, one smoothing, and their adjoints. Shifting and scaling a pair to its own range is arithmetic on
these moments. With the positions in front, smoothing is two products with band matrices, on long contiguous rows: on a
CPU that is several times faster than a convolution with one filter a channel.

Axes: T maps, B examples, C channels, H and W of the map, H' and W' positions of the window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

Pairs = Sequence[tuple[int, int]]

_K1, _K2 = 0.01, 0.03
_SIGMA_PER_SIDE: Final = 1.5 / 11
"""Wang et al. 2004: a Gaussian of sigma 1.5 in a window of 11; smaller windows keep the proportion."""
_CHUNK_NUMBERS: Final = 2**18
"""On a CPU, examples are taken in chunks of so many numbers a map, which stay in the cache through all pairs."""


def windowed_ssim(
    maps: Sequence[Tensor], pairs: Pairs, window: int, low: Tensor, span: Tensor
) -> tuple[Tensor, Tensor]:
    """(pairs, B, C) each: SSIM, and its contrast-structure factor, averaged over the positions of the window.

    ``maps`` are (B, C, H, W), of one shape; ``low`` and ``span`` (pairs, B) are the values that stand for 0 and for the
    data range, and get no gradient. First derivatives only.
    """
    scale = _Scale(low=low[..., None], c1=(_K1 * span[..., None]).square(), c2=(_K2 * span[..., None]).square())
    answer: tuple[Tensor, Tensor] = _WindowedSsim.apply(tuple(pairs), Smoothing.of(maps[0], window), scale, *maps)
    return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothing:
    """Gaussian means over all windows that lie wholly on the map ("valid"), as a linear map and its adjoint."""

    rows: Tensor
    """(H', H)."""
    columns: Tensor
    """(W', W)."""

    @classmethod
    def of(cls, like: Tensor, window: int) -> Smoothing:
        """For maps of the size, type and place of ``like``, (..., H, W)."""
        h, w = like.shape[-2:]
        return cls(rows=torch.as_tensor(_band(h, window)).to(like), columns=torch.as_tensor(_band(w, window)).to(like))

    def means(self, x: Tensor) -> Tensor:
        """(H, W, B, C) to (H', W', B, C)."""
        return _along_both(self.rows, self.columns, x)

    def spread(self, g: Tensor) -> Tensor:
        """The adjoint of `means`: (H', W', B, C) to (H, W, B, C)."""
        return _along_both(self.rows.mT, self.columns.mT, g)


def _along_both(rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    _, w, *rest = x.shape
    x = (rows @ x.reshape(x.shape[0], -1)).view(len(rows), w, -1)
    return (columns @ x).view(len(rows), len(columns), *rest)


@lru_cache(maxsize=64)
def _band(side: int, window: int) -> NDArray[np.float64]:
    offsets = np.arange(window) - window // 2
    gauss = np.exp(-0.5 * (offsets / (_SIGMA_PER_SIDE * window)) ** 2)
    band = np.zeros((side - window + 1, side))
    for p in range(len(band)):
        band[p, p : p + window] = gauss / gauss.sum()
    return band


class _WindowedSsim(torch.autograd.Function):
    """See `windowed_ssim`. Its gradient is written out: a graph of single operations takes several times as long."""

    @staticmethod
    def forward(ctx: Any, pairs: Pairs, smoothing: Smoothing, scale: _Scale, *maps: Tensor) -> tuple[Tensor, Tensor]:
        """Covariances are kept for `backward`; the products of the maps are not."""
        similarity, contrast = maps[0].new_empty((2, len(pairs), *maps[0].shape[:2]))
        ctx.pairs, ctx.smoothing, ctx.scale, ctx.moments = pairs, smoothing, scale, []
        for b in _chunks(maps[0]):
            centred, moments = _moments([z[b] for z in maps], smoothing)
            for k, (i, j) in enumerate(pairs):
                product = smoothing.means(centred[i] * centred[j])
                moments.covariances.append(product.addcmul_(moments.centred[i], moments.centred[j], value=-1))
                factors = _factors(moments, k, (i, j), scale.of(k, b))
                contrast[k, b] = factors.contrast.mean((0, 1))
                similarity[k, b] = (factors.luminance * factors.contrast).mean((0, 1))
            ctx.moments.append(moments)
        ctx.save_for_backward(*maps)
        return similarity, contrast

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_similarity: Tensor, d_contrast: Tensor) -> tuple[Tensor | None, ...]:
        """The same chunks again."""
        maps: tuple[Tensor, ...] = ctx.saved_tensors
        wanted = ctx.needs_input_grad[-len(maps) :]
        gradients = [z.new_empty(z.shape) if w else None for z, w in zip(maps, wanted, strict=True)]
        for b, moments in zip(_chunks(maps[0]), ctx.moments, strict=True):
            sums = _GradientSums([z[b] for z in maps], moments, ctx.smoothing, wanted)
            for k, (i, j) in enumerate(ctx.pairs):
                factors = _factors(moments, k, (i, j), ctx.scale.of(k, b))
                sums.add_pair(k, (i, j), factors, d_similarity[k, b], d_contrast[k, b])
            for t, gradient in enumerate(gradients):
                if gradient is not None:
                    part = gradient[b]
                    part.view(-1, math.prod(part.shape[2:])).copy_(_examples_first(sums.total(t)))
        return (None, None, None, *gradients)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """What stands for 0, and the constants that keep SSIM's quotients finite, (pairs, B, 1) each."""

    low: Tensor
    c1: Tensor
    c2: Tensor

    def of(self, k: int, b: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of one pair and some examples, (B, 1) each."""
        return self.low[k, b], self.c1[k, b], self.c2[k, b]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moments:
    """Of some examples under every position of the window, (H', W', B, C) per map or per pair.

    Variances do not depend on a constant. Each channel's mean over the map is kept apart therefore: beside a large one
    a difference of squares would lose the variance.
    """

    offsets: list[Tensor]
    """The channels' means, (B, C) per map."""
    centred: list[Tensor]
    """Means without the offset."""
    means: list[Tensor]
    variances: list[Tensor]
    covariances: list[Tensor]


def _moments(maps: Sequence[Tensor], smoothing: Smoothing) -> tuple[list[Tensor], _Moments]:
    """The maps as (H, W, B, C) without their offsets, and their moments; covariances are yet to come."""
    offsets = [z.mean((-2, -1)) for z in maps]
    centred = _centred(maps, offsets)
    means = [smoothing.means(z) for z in centred]
    return centred, _Moments(
        offsets=offsets,
        centred=means,
        means=[m + offset for m, offset in zip(means, offsets, strict=True)],
        variances=[smoothing.means(z * z).addcmul_(m, m, value=-1) for z, m in zip(centred, means, strict=True)],
        covariances=[],
    )


def _centred(maps: Sequence[Tensor], offsets: Sequence[Tensor]) -> list[Tensor]:
    return [_positions_first(z).sub_(offset) for z, offset in zip(maps, offsets, strict=True)]


def _positions_first(z: Tensor) -> Tensor:
    """(B, C, H, W) to (H, W, B, C), contiguous. As a matrix, for PyTorch is slower at permuting four axes."""
    b, c, h, w = z.shape
    return z.reshape(b * c, h * w).t().contiguous().view(h, w, b, c)


def _examples_first(z: Tensor) -> Tensor:
    """The inverse of `_positions_first`, as a view."""
    h, w, b, c = z.shape
    return z.view(h * w, b * c).t()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Factors:
    """SSIM of one pair = luminance * contrast, at every position of the window; (H', W', B, C) each."""

    first: Tensor
    second: Tensor
    luminance: Tensor
    luminance_below: Tensor
    contrast: Tensor
    contrast_below: Tensor
    """Denominators are kept for the derivatives."""


def _factors(moments: _Moments, k: int, pair: tuple[int, int], scale: tuple[Tensor, Tensor, Tensor]) -> _Factors:
    (i, j), (low, c1, c2) = pair, scale
    first, second = moments.means[i] - low, moments.means[j] - low
    luminance_below = (first * first).addcmul_(second, second).add_(c1)
    contrast_below = (moments.variances[i] + moments.variances[j]).add_(c2)
    return _Factors(
        first=first,
        second=second,
        luminance=(first * second).mul_(2).add_(c1).div_(luminance_below),
        luminance_below=luminance_below,
        contrast=torch.add(c2, moments.covariances[k], alpha=2).div_(contrast_below),
        contrast_below=contrast_below,
    )


class _GradientSums:
    """Collects the gradient by the maps, and by their means and variances, over all pairs that a map is in."""

    def __init__(self, maps: Sequence[Tensor], moments: _Moments, smoothing: Smoothing, wanted: Sequence[bool]) -> None:
        self._moments, self._smoothing, self._wanted = moments, smoothing, wanted
        self._centred = _centred(maps, moments.offsets)
        self._d_maps = [torch.zeros_like(z) for z in self._centred]
        self._d_means = [torch.zeros_like(m) for m in moments.means]
        self._d_variances = [torch.zeros_like(m) for m in moments.means]

    def add_pair(
        self, k: int, pair: tuple[int, int], factors: _Factors, d_similarity: Tensor, d_contrast: Tensor
    ) -> None:
        """One pair's share, from the gradients by its averages over the positions, (B, C) each."""
        n_positions = math.prod(factors.first.shape[:2])
        d_similarity, d_contrast = d_similarity / n_positions, d_contrast / n_positions
        d_luminance = (d_similarity * factors.contrast).mul_(2).div_(factors.luminance_below)
        d_contrast = (d_similarity * factors.luminance).add_(d_contrast).div_(factors.contrast_below)
        d_variance = d_contrast * factors.contrast
        d_covariance = d_contrast.mul_(2)
        d_product = self._smoothing.spread(d_covariance)
        i, j = pair
        for own, other, mean, mean_other in (
            (i, j, factors.first, factors.second),
            (j, i, factors.second, factors.first),
        ):
            if self._wanted[own]:
                d_mean = torch.addcmul(mean_other, mean, factors.luminance, value=-1)
                self._d_means[own].addcmul_(d_luminance, d_mean)
                self._d_means[own].addcmul_(d_covariance, self._moments.centred[other], value=-1)
                self._d_variances[own].sub_(d_variance)
                self._d_maps[own].addcmul_(d_product, self._centred[other])

    def total(self, t: int) -> Tensor:
        """The whole gradient by one map, (H, W, B, C). A variance is the mean of squares minus the mean's square."""
        d_variance = self._d_variances[t]
        d_mean = self._d_means[t].addcmul_(d_variance, self._moments.centred[t], value=-2)
        total = self._d_maps[t].add_(self._smoothing.spread(d_mean))
        return total.addcmul_(self._smoothing.spread(d_variance), self._centred[t], value=2)


def _chunks(maps_BCHW: Tensor) -> Iterator[slice]:
    n, *shape = maps_BCHW.shape
    size = max(1, _CHUNK_NUMBERS // math.prod(shape)) if maps_BCHW.device.type == "cpu" else n
    for start in range(0, n, size):
        yield slice(start, start + size)
