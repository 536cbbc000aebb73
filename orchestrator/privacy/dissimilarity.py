"""The dissimilarity term: what pushes every two tasks' features apart (MetaMorphosis, equations 5 and 6).

    loss = sum_i L_i + omega * S,    S = sum over i != j of mean over x of mode( similarity(z_i(x), z_j(x)) )

The sum runs over ordered pairs, as printed, so every unordered pair counts twice. Examples do not touch each other:
changing one image changes neither the value nor the gradient of another. A small S is no proof of privacy: a
permutation of the channels makes it small and hides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from orchestrator.errors import ConfigError, NonFiniteLossError, UnknownNameError
from orchestrator.privacy.similarity import (
    MeasureName,
    RangeName,
    choose_measure,
    pairs,
    pairwise_similarity,
)

ModeName: TypeAlias = Literal["raw", "abs", "square", "relu"]

_MODES: Mapping[ModeName, Callable[[Tensor], Tensor]] = {
    "raw": lambda similarity: similarity,
    "abs": torch.abs,
    "square": torch.square,
    "relu": torch.relu,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DissimilarityConfig:
    """How the features of different tasks are pushed apart."""

    omega: float = 0.001
    """Weight of the dissimilarity term; 0 leaves it out. The paper uses 0.001 (every pair counts twice)."""
    similarity: MeasureName = "ssim"
    """What is made small: ssim (CelebA, NYUv2 and Cityscapes in the paper) or ms_ssim (StateFarm). Maps below 3x3 have
    no structure; there it is the cosine of the channels."""
    similarity_mode: ModeName = "square"
    """square and abs pull the similarity to 0 (the paper's equation 4), raw pushes it on towards -1 (its equation 6 as
    printed), relu stops at 0."""
    similarity_range: RangeName = "pair"
    """What SSIM takes for the range of values. pair: of both features, per image; 255: a library's default, under which
    independent features already have SSIM 0.985."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.omega) and self.omega >= 0):
            raise ConfigError(f"omega must be a finite number >= 0, got {self.omega}; 0 leaves dissimilarity out")
        for name, kinds in (
            ("similarity", MeasureName),
            ("similarity_mode", ModeName),
            ("similarity_range", RangeName),
        ):
            if getattr(self, name) not in get_args(kinds):
                raise UnknownNameError(name, getattr(self, name), get_args(kinds))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DissimilarityValue:
    """The term of one batch, before omega."""

    loss: Tensor
    """S, a scalar. It has a graph to every feature that is not fixed, also where it is 0 because there is no pair."""
    by_pair: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Mean similarity, before the mode, of every unordered pair that counts."""
    measure_used: str = ""
    """What the similarity came down to on maps of this size; empty where there was no pair."""


class Dissimilarity:
    """Computes the term. Holds nothing but its configuration."""

    def __init__(self, config: DissimilarityConfig) -> None:
        self.config = config

    def __call__(self, features: Mapping[str, Tensor], *, fixed: frozenset[str] = frozenset()) -> DissimilarityValue:
        """The term over features (B, C, H, W), or (B, D), of one shape.

        Features named in ``fixed`` (tasks that are already published, the private branch) get no gradient, and pairs of
        two of them are left out. Raises `UnknownNameError` for a fixed name without a feature, `ConfigError` for
        features of different shapes.
        """
        for name in sorted(fixed - set(features)):
            raise UnknownNameError("feature", name, features)
        names = sorted(features, key=lambda name: name in fixed)  # stable: the free ones first
        maps = [_as_map(features[name]) for name in names]
        _check_shapes(dict(zip(names, maps, strict=True)))
        n_free = len(features) - len(fixed)
        index = pairs(len(maps), n_free)
        if not index or maps[0].numel() == 0:
            return DissimilarityValue(loss=_zero(maps[:n_free]))
        measure = choose_measure(self.config.similarity, *maps[0].shape[-2:])
        similarity = pairwise_similarity(maps, measure=measure, value_range=self.config.similarity_range, n_free=n_free)
        means = similarity.detach().mean(1).tolist()
        return DissimilarityValue(
            loss=2 * _MODES[self.config.similarity_mode](similarity).mean(1).sum(),
            by_pair={(names[i], names[j]): mean for (i, j), mean in zip(index, means, strict=True)},
            measure_used=str(measure),
        )


class DissimilarityPull(NamedTuple):
    """What the term does to one batch of features."""

    gradients: Mapping[str, Tensor]
    """omega * dS/dz of the tasks that get any (MetaMorphosis, eq. 6); empty where there is nothing to push apart."""
    value: float
    """S, before omega."""
    by_pair: Mapping[tuple[str, str], float]
    """As in `DissimilarityValue`."""


def dissimilarity_pull(
    term: Dissimilarity, features: Mapping[str, Tensor], *, fixed: Mapping[str, Tensor], step: int
) -> DissimilarityPull:
    """How the features are pushed apart, and from the ``fixed`` ones. The features' own graphs are not walked.

    Raises `NonFiniteLossError`, with the number of the ``step``, where the term is not finite.
    """
    omega = term.config.omega
    if omega == 0 or len(features) + len(fixed) < 2 or not any(len(z) for z in features.values()):
        return DissimilarityPull({}, 0.0, {})
    leaves = {task: z.detach().requires_grad_() for task, z in features.items()}
    value = term({**leaves, **fixed}, fixed=frozenset(fixed))
    loss = float(value.loss.detach())
    if not math.isfinite(loss):
        raise NonFiniteLossError("dissimilarity", step, loss)
    gradients = torch.autograd.grad(value.loss, list(leaves.values()), allow_unused=True)
    return DissimilarityPull(
        {task: omega * gradient for task, gradient in zip(leaves, gradients, strict=True) if gradient is not None},
        loss,
        value.by_pair,
    )


def pair_similarity(a: Tensor, b: Tensor, *, measure: MeasureName = "ssim", value_range: RangeName = "pair") -> Tensor:
    """(B,): how similar two features (B, C, H, W), or (B, D), are, image by image; 1 for identical ones."""
    maps = [_as_map(a), _as_map(b)]
    _check_shapes({"a": maps[0], "b": maps[1]})
    if len(a) == 0:
        return a.new_zeros(0)
    chosen = choose_measure(measure, *maps[0].shape[-2:])
    return pairwise_similarity(maps, measure=chosen, value_range=value_range)[0]


def _as_map(z: Tensor) -> Tensor:
    if z.ndim == 2:
        return z[:, :, None, None]
    if z.ndim != 4:
        raise ConfigError(f"a feature must be a map (B, C, H, W) or a vector (B, D), got shape {tuple(z.shape)}")
    return z


def _check_shapes(maps: Mapping[str, Tensor]) -> None:
    if len({z.shape for z in maps.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(z.shape)}" for name, z in maps.items())
        raise ConfigError(f"features can only be compared when they have one shape, got {shapes}")


def _zero(free: list[Tensor]) -> Tensor:
    """0 with a graph: the sum of no elements of each feature."""
    return torch.stack([z[:0].sum() for z in free]).sum() if free else torch.zeros(())
