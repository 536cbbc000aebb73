"""What keeps a tenant from reading more in its feature than it bought."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import ConfigError
from orchestrator.network import BoundedNetworkConfig, NetworkConfig
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.dissimilarity import DissimilarityConfig, ModeName
from orchestrator.privacy.similarity import MeasureName, RangeName
from orchestrator.shaping import Secret, ShapingPlan

DEFAULT_RATE_WEIGHT = 0.1
"""Measured to cost no accuracy, and to leave less for others to read; see docs/decisions/0014-bounded-features.md."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPrivacySettings:
    """What keeps a tenant from reading more in its feature than it bought."""

    task_privacy: Literal["dissimilarity", "bounded"] = "dissimilarity"
    """dissimilarity: features of different tasks are pushed apart, as in the paper, which guarantees nothing; bounded:
    each feature is a short vector under noise, which carries at most so many bits of its image, whoever asks."""
    feature_bits: float | None = None
    """With bounded: at most so many bits an image, those of all its cells together. More serve a task better, up to a
    point: two classes take 1 bit, 26 take 4.7, and what is left over is there for others to read."""
    feature_cells: int = 1
    """With bounded: into how many cells the feature is cut, as a square map of vectors (16: 4x4), each with an equal
    share of the bits. For tasks that answer with a map; a class needs one."""
    feature_dimensions: int | None = None
    """With bounded, in place of the bits: numbers in the vector of a cell, whose mean square is 1."""
    feature_noise: float | None = None
    """With bounded, in place of the bits: standard deviation of the noise on each of them."""
    feature_noise_kind: Literal["keyed", "fresh"] = "keyed"
    """With bounded, of what is released after training. keyed: the same image has the same noise whenever it is asked
    for, so that asking again tells nothing new; fresh: every release has noise of its own, and is charged again."""
    rate_weight: float | None = None
    """With bounded: what a nat costs that a feature tells beyond its task's own label. It makes the same bits go to the
    task, so that less is left for others to read. Default: 0.1 with bounded; 0 leaves it out."""
    named_secrets: tuple[str, ...] = ()
    """With bounded: attributes, as A,B,C, that no feature is to tell beyond what its task's label does. Adversaries try
    to read them in training, and modules learn to give them nothing. The producer needs their labels; no tenant gets
    them. They add no guarantee."""
    secret_weight: float = 1.0
    """How much it counts what these adversaries find."""
    omega: float | None = None
    """Weight of the dissimilarity term; 0 leaves it out. Default: 0.001 (the paper's, in which every pair counts
    twice), and 0 with bounded."""
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
        bits = self.feature_bits is not None
        parts = (self.feature_dimensions is not None, self.feature_noise is not None)
        others = self.feature_cells != 1 or self.feature_noise_kind != "keyed"
        others = others or bool(self.rate_weight) or bool(self.named_secrets)
        if self.task_privacy != "bounded" and (bits or any(parts) or others):
            raise ConfigError(
                "--feature-bits, --feature-cells, --feature-dimensions, --feature-noise, --feature-noise-kind, "
                "--rate-weight and --named-secrets are of bounded features: give --task-privacy bounded, or leave them "
                "out"
            )
        if self.task_privacy == "bounded":
            if bits and any(parts):
                raise ConfigError(
                    "--feature-bits chooses dimensions and noise itself: leave it out, or --feature-dimensions and "
                    "--feature-noise"
                )
            if not bits and not all(parts):
                raise ConfigError(
                    "--task-privacy bounded needs to know how much a feature may tell: give --feature-bits, for "
                    "instance 4, or both --feature-dimensions and --feature-noise"
                )
        # What they refuse is refused before anything is read.
        _ = self.dissimilarity, self.channel and self.channel.side, self.shaping({})
        if len(set(self.named_secrets)) != len(self.named_secrets):
            raise ConfigError(f"a secret is named twice in --named-secrets {','.join(self.named_secrets)}")

    def check_without_shaping(self, without: str) -> None:
        """Raise `ConfigError` if terms were asked for that modules under DP cannot have."""
        if self.rate_weight or self.named_secrets:
            raise ConfigError(
                "--rate-weight and --named-secrets look at several images at a time, and modules under DP are clipped "
                f"image by image: leave them out, or {without}"
            )

    @property
    def channel(self) -> ChannelConfig | None:
        """Of every task of the command; None: features are not bounded."""
        if self.feature_bits is not None:
            return ChannelConfig.for_bits(self.feature_bits, cells=self.feature_cells)
        if self.feature_dimensions is not None and self.feature_noise is not None:
            return ChannelConfig(dimensions=self.feature_dimensions, noise=self.feature_noise, cells=self.feature_cells)
        return None

    @property
    def dissimilarity(self) -> DissimilarityConfig:
        """The term that training adds, on top of the bound if there is one."""
        omega = self.omega
        if omega is None:
            omega = DissimilarityConfig().omega if self.task_privacy == "dissimilarity" else 0.0
        return DissimilarityConfig(
            omega=omega,
            similarity=self.similarity,
            similarity_mode=self.similarity_mode,
            similarity_range=self.similarity_range,
        )

    def shaping(self, secrets: Mapping[str, Secret]) -> ShapingPlan:
        """What is asked of bounded features in training, with the labels of the named secrets."""
        if self.task_privacy != "bounded":
            return ShapingPlan()
        rate = DEFAULT_RATE_WEIGHT if self.rate_weight is None else self.rate_weight
        return ShapingPlan(rate_weight=rate, secret_weight=self.secret_weight, secrets=secrets)

    def network(self, network: NetworkConfig) -> NetworkConfig:
        """The networks of the command's tasks."""
        return network if self.channel is None else BoundedNetworkConfig.of(network, self.channel)
