"""The channel of a bounded feature: a vector of fixed power under Gaussian noise, which carries so many bits.

    s = v sqrt(d) / ||v||        z = s + tau n,  n ~ N(0, I_d)        I(x; z) <= (d / 2) log2(1 + 1 / tau^2)

The bound is the capacity of the Gaussian channel under a power constraint (Cover & Thomas, sections 9.1 and 9.4). It
needs ||s||^2 <= d and the noise, and holds for every distribution of the images and every attacker.

Axes: B examples, D dimensions of a vector, H and W of a map of vectors (dense tasks), each of which is a *cell*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from orchestrator.config import from_mapping
from orchestrator.errors import ConfigError, NonFiniteFeatureError, PrivacyRefusal

REFERENCE_NOISE: Final = 0.5
"""The noise that was measured to serve tasks well (SPEC E.7), at 1.16 bits a dimension."""
MIN_NOISE: Final = 1e-3
"""Below it the rounding of float32 is no longer small beside the noise."""
MIN_DIMENSIONS: Final = 2
"""Of the rule: a vector of one dimension is only a sign, which no gradient moves."""
MIN_NORM: Final = 1e-6
"""A vector whose largest coordinate is smaller is not raised to full power, so that its gradient stays bounded."""
POWER_TOLERANCE: Final = 1e-5
"""Relative excess of ||s||^2 over d that float32 may show. It is worth at most d * 7.3e-6 bits."""
RELEASE_STEP: Final = 2.0**-7
"""Grid of released coordinates: float16 holds its multiples exactly up to 16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelConfig:
    """One channel: of a single vector, or of a map of equal cells, whose bits add up."""

    dimensions: int
    """d, coordinates of a vector. With 1 a vector is but a sign: the bound holds, and is loose above one bit."""
    noise: float
    """tau, standard deviation of the noise on each coordinate, whose mean square is 1."""
    cells: int = 1
    """H * W vectors of an image for a dense task; 1 for a classifier."""

    def __post_init__(self) -> None:
        for name in ("dimensions", "cells"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of a bounded feature must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.noise) and self.noise >= MIN_NOISE):
            raise ConfigError(
                f"the noise of a bounded feature must be a finite number >= {MIN_NOISE:g}, got {self.noise}; without "
                "noise nothing bounds what a feature tells"
            )

    @property
    def side(self) -> int:
        """H and W, where the cells are a square map. Raises `ConfigError` where they cannot be one."""
        side = math.isqrt(self.cells)
        if side**2 != self.cells:
            raise ConfigError(
                f"the cells of a bounded feature are a square map, so there may be 1, 4, 9, 16 ... of them, got "
                f"{self.cells}"
            )
        return side

    @property
    def bits_per_cell(self) -> float:
        """Capacity of one vector, (d / 2) log2(1 + 1 / tau^2)."""
        return _bits(self.dimensions, self.noise)

    @property
    def bits_per_image(self) -> float:
        """Capacity of one release: of all cells of one image."""
        return self.cells * self.bits_per_cell

    @property
    def capacity_bits(self) -> float:
        """What one release of one image tells at most; another word for `bits_per_image`."""
        return self.bits_per_image

    @classmethod
    def for_bits(cls, bits: float, *, dimensions: int | None = None, cells: int = 1) -> ChannelConfig:
        """The channel that carries ``bits`` an image, and never more, in floating point neither.

        Where ``dimensions`` is left out it is the number that brings the noise nearest to `REFERENCE_NOISE`,
        max(2, round(bits per cell / 1.161)); the noise is then solved for exactly, tau = (2^(2 bits / d) - 1)^(-1/2).
        9.3 bits give d = 8 and 4.6 give d = 4, both with tau = .5, as measured in SPEC E.7. From 2 bits a cell
        on, tau is between .39 and .60; below, it grows. Raises `ConfigError`.
        """
        if not (math.isfinite(bits) and bits > 0):
            raise ConfigError(f"the bits of a feature must be a finite number > 0, got {bits}")
        if cells < 1 or (dimensions is not None and dimensions < 1):
            raise ConfigError(f"a bounded feature has at least 1 dimension and 1 cell, got {dimensions} and {cells}")
        per_cell = bits / cells
        if dimensions is None:
            dimensions = max(MIN_DIMENSIONS, round(per_cell / _bits(1, REFERENCE_NOISE)))
        most = _bits(dimensions, MIN_NOISE)
        if per_cell > most:
            raise ConfigError(
                f"{per_cell:g} bits do not go into {dimensions} dimensions, which carry at most {most:g} at the "
                f"smallest noise of {MIN_NOISE:g}; give more dimensions, or leave them out"
            )
        noise = 1 / math.sqrt(math.expm1(2 * math.log(2) * per_cell / dimensions))
        channel = cls(dimensions=dimensions, noise=max(noise, MIN_NOISE), cells=cells)
        while channel.bits_per_image > bits:  # by rounding alone
            noise *= 1 + 2.0**-50
            channel = cls(dimensions=dimensions, noise=noise, cells=cells)
        return channel

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChannelConfig:
        """Read what `to_json` wrote. An unknown or missing key, or a wrong type, is a `ConfigError`."""
        return from_mapping(cls, data, where="channel of a bounded feature")


def power_normalise(v: Tensor) -> Tensor:
    """s, with ||s||^2 = d for each vector; of the shape of v, (B, D) or (B, D, H, W), and at least float32.

    Vectors run along the second axis. One that is all but zero (`MIN_NORM`) keeps less power, and zero stays zero: no
    vector ever has more than d. Raises `NonFiniteFeatureError` if v is not finite.
    """
    if v.ndim not in {2, 4} or not v.is_floating_point():
        raise ConfigError(f"vectors are a float tensor (B, D) or (B, D, H, W), got {v.dtype} of shape {tuple(v.shape)}")
    v = v.float() if v.dtype in {torch.float16, torch.bfloat16} else v
    if not torch.isfinite(v.detach()).all():
        raise NonFiniteFeatureError(
            "a vector to be sent is NaN or infinite: the module has diverged, or its input is bad"
        )
    # Dividing by the largest coordinate first keeps the squares from overflow. s does not depend on the length of v, so
    # that divisor needs no gradient. The norm is then at least 1, except where the floor has acted.
    unit = v / v.detach().abs().amax(1, keepdim=True).clamp_min(MIN_NORM)
    norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True).clamp_min(1.0)
    s: Tensor = unit / norm * math.sqrt(v.shape[1])
    return s


def transmit(s: Tensor, noise: Tensor, tau: float) -> Tensor:
    """z = s + tau n, of the shape of s; n of the same shape is standard normal, from `keyed_noise` or a generator.

    What leaves the producer should be computed with float64 noise and then `quantised`. Raises `PrivacyRefusal` if a
    vector has more power than d, for which the channel's bound would not hold, and `ConfigError` for another shape.
    """
    if s.shape != noise.shape:
        raise ConfigError(f"noise must have the shape of the vectors, {tuple(s.shape)}, got {tuple(noise.shape)}")
    if not tau >= MIN_NOISE:
        raise ConfigError(f"the noise of a bounded feature must be >= {MIN_NOISE:g}, got {tau}")
    d = s.shape[1]
    power = s.detach().square().sum(1)
    if not (power <= d * (1 + POWER_TOLERANCE)).all():
        raise PrivacyRefusal(
            f"a vector of {d} dimensions has power {float(power.max()):g}, and the channel's bound allows {d}: "
            "pass it through power_normalise first"
        )
    return s + tau * noise


def quantised(z: Tensor) -> Tensor:
    """z rounded to multiples of `RELEASE_STEP`, in the type of z.

    A float's last digits depend on how the noise was computed and can give away s, as for other mechanisms with
    floating-point noise (Mironov, CCS 2012). On a grid far coarser than the noise's own resolution they do not, and
    rounding afterwards never adds a bit.
    """
    return torch.round(z / RELEASE_STEP) * RELEASE_STEP


def _bits(dimensions: int, noise: float) -> float:
    # The form for small noise subtracts nothing and squares nothing large.
    nats = math.log1p(noise**2) - 2 * math.log(noise) if noise < 1 else math.log1p((1 / noise) ** 2)
    return dimensions / 2 * nats / math.log(2)
