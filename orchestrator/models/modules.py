"""Metamorphosis modules g_i: what turns the encoder's feature u into task i's feature z_i.

Without a channel z_i has the shape of u. With one, g_i ends in a short vector s_i of known power, or a small map of
them, and z_i is that under noise, which the producer adds (`orchestrator.release`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from orchestrator.config import from_mapping
from orchestrator.errors import ConfigError
from orchestrator.models.bounded_vector import BoundedMap, BoundedVector
from orchestrator.models.cross_sec import CrossSec
from orchestrator.models.seeding import seeded
from orchestrator.privacy.bounded.channel import ChannelConfig
from tasks.registry import look_up


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleConfig:
    """What builds a metamorphosis module."""

    kind: str = "cross_sec"
    """cross_sec is the paper's; sec does not cross the gates; conv1x1 and identity are for comparison."""
    channels: int
    """C of the feature, in and out."""
    splits: int = 2
    """Into how many groups cross_sec and sec cut the channels."""
    expansion: int = 2
    """Width of the hidden layer of a gate, per channel of its split."""
    channel: ChannelConfig | None = None
    """Of a bounded feature, which is a map of a d-vector for each cell, (d, 1, 1) with one; None: the feature is a map
    like u, and nothing bounds it."""

    def __post_init__(self) -> None:
        look_up(MODULES, "metamorphosis module", self.kind)
        for name in ("channels", "splits", "expansion"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of a metamorphosis module must be at least 1, got {getattr(self, name)}")
        if self.kind in {"cross_sec", "sec"} and self.channels % self.splits:
            raise ConfigError(
                f"{self.kind} cannot cut {self.channels} channels into {self.splits} equal splits: "
                f"use a number of splits that divides {self.channels}"
            )
        if self.kind == "cross_sec" and self.splits == 1:
            raise ConfigError("cross_sec needs at least 2 splits to cross, got 1; use sec for a single one")
        if self.channel is not None:
            _ = self.channel.side  # or it is no map

    def feature_shape(self, u_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of this task's feature, from that of u. Raises `ConfigError` for more cells than u has places."""
        if self.channel is None:
            return u_shape
        side = self.channel.side
        if side > min(u_shape[1:]):
            raise ConfigError(
                f"{self.channel.cells} vectors an image do not fit a map of {u_shape[1]}x{u_shape[2]}: use at most "
                f"{min(u_shape[1:]) ** 2} cells, an earlier split index, or larger images"
            )
        return self.channel.dimensions, side, side

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back. Without a channel it says nothing of one."""
        return {name: value for name, value in asdict(self).items() if name != "channel" or value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModuleConfig:
        """Read what `to_json` wrote. An unknown or missing key, or a wrong type, is a `ConfigError`."""
        return from_mapping(cls, data, where="metamorphosis module")


def _cross_sec(config: ModuleConfig) -> nn.Module:
    return CrossSec(config.channels, splits=config.splits, expansion=config.expansion)


def _sec(config: ModuleConfig) -> nn.Module:
    return CrossSec(config.channels, splits=config.splits, expansion=config.expansion, cross=False)


def _conv1x1(config: ModuleConfig) -> nn.Module:
    return nn.Conv2d(config.channels, config.channels, 1, bias=False)


def _identity(config: ModuleConfig) -> nn.Module:
    return nn.Identity()


MODULES: Mapping[str, Callable[[ModuleConfig], nn.Module]] = {
    "cross_sec": _cross_sec,
    "sec": _sec,
    "conv1x1": _conv1x1,
    "identity": _identity,
}


def _bounded(channels: int, channel: ChannelConfig) -> nn.Module:
    """V_i."""
    if channel.cells == 1:
        return BoundedVector(channels, channel.dimensions)
    return BoundedMap(channels, channel.dimensions, channel.side)


def build_module(config: ModuleConfig, *, seed: int) -> nn.Module:
    """A freshly initialised g_i: (B, C, H, W) to (B, C, H, W), with a channel to s of (B, d, h, w), before any noise.

    The process's random state is not touched.
    """
    with seeded(seed):
        module = MODULES[config.kind](config)
        if config.channel is None:
            return module
        return nn.Sequential(OrderedDict(metamorphosis=module, vector=_bounded(config.channels, config.channel)))


def rebuild_module(config: ModuleConfig, state: Mapping[str, Any]) -> nn.Module:
    """A g_i with weights that were kept of one."""
    module = build_module(config, seed=0)
    module.load_state_dict(dict(state))
    return module
