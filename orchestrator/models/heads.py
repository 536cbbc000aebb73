"""The tenant's head M_i: from its task's feature to one number per output, or a map of them.

Axes: B examples, C, H, W of the feature.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from orchestrator.config import from_mapping
from orchestrator.errors import ConfigError
from orchestrator.models.resnet import build_backbone
from orchestrator.models.seeding import seeded
from orchestrator.models.split import MAX_SPLIT, check_split, feature_shape
from tasks.registry import look_up
from tasks.spec import TaskSpec

POOLED_SIDE = 4
"""To which a linear head pools larger maps, so that its weights do not outnumber the examples."""
HIDDEN = 128
"""Width of an mlp head."""
MAP_WIDTH = 64
"""Of the convolutions of a head that answers with a map."""
_ANY_IMAGE_SIZE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """What builds a head."""

    kind: str
    """backbone: the rest of the backbone, as in the paper; linear: pooling and one linear layer; mlp: with a hidden
    layer between, for short vectors; map: convolutions at the resolution of the answer, for dense tasks."""
    backbone: str
    """Whose first children are the encoder; see `orchestrator.models.resnet`."""
    split_index: int
    """How many of them."""
    n_outputs: int
    """Numbers the head answers with per example."""
    feature_shape: tuple[int, int, int]
    """(C, H, W) of the feature."""
    answer_size: tuple[int, int] | None = None
    """(H, W) of a map's answer, with n_outputs channels; None for other kinds."""

    def __post_init__(self) -> None:
        look_up(HEAD_KINDS, "head", self.kind)
        if (self.kind == "map") != (self.answer_size is not None):
            raise ConfigError(
                f"a head of kind {self.kind!r} and an answer of size {self.answer_size} do not go together"
            )
        if self.answer_size is not None and min(self.answer_size) < 1:
            raise ConfigError(f"a head cannot answer with a map of {self.answer_size}")
        check_split(self.backbone, self.split_index)
        if self.n_outputs < 1:
            raise ConfigError(f"a head needs at least one output, got {self.n_outputs}")
        if len(self.feature_shape) != 3 or min(self.feature_shape) < 1:
            raise ConfigError(f"a head needs a feature of shape (C, H, W), got {self.feature_shape}")
        if self.kind == "backbone":
            self._check_continues()

    def _check_continues(self) -> None:
        """The rest of the backbone takes the channels that the split left, on maps of any size."""
        expected = feature_shape(self.backbone, self.split_index, _ANY_IMAGE_SIZE)
        got = self.feature_shape
        if got[0] != expected[0] or (self.split_index == MAX_SPLIT and got != expected):
            wanted = "x".join(map(str, expected)) if self.split_index == MAX_SPLIT else f"{expected[0]} channels"
            raise ConfigError(
                f"the rest of {self.backbone} from split index {self.split_index} takes a feature of {wanted}, "
                f"got {'x'.join(map(str, got))}; use the linear or the mlp head for other features"
            )

    @classmethod
    def for_task(
        cls, spec: TaskSpec, *, kind: str, backbone: str, split_index: int, feature_shape: tuple[int, int, int]
    ) -> HeadConfig:
        """Of that kind where the task answers with a class; one that answers with a map has a head of its own kind."""
        return cls(
            kind="map" if spec.shape is not None else kind,
            backbone=backbone,
            split_index=split_index,
            n_outputs=spec.n_outputs,
            feature_shape=feature_shape,
            answer_size=None if spec.shape is None else spec.shape[1:],
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back. Of other kinds it says nothing of maps."""
        found = {**asdict(self), "feature_shape": list(self.feature_shape)}
        size = found.pop("answer_size")
        return found if size is None else {**found, "answer_size": list(size)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeadConfig:
        """Read what `to_json` wrote. An unknown or missing key, or a wrong type, is a `ConfigError`."""
        return from_mapping(cls, data, where="head")


def _rest_of_backbone(config: HeadConfig, seed: int) -> nn.Module:
    children = dict(build_backbone(config.backbone, n_outputs=config.n_outputs, seed=seed).named_children())
    names = list(children)[config.split_index : -1]
    # ResNet.forward flattens between the average pool and fc; as a sequence it needs a layer for that.
    layers = [*((name, children[name]) for name in names), ("flatten", nn.Flatten()), ("fc", children["fc"])]
    return nn.Sequential(OrderedDict(layers))


def _linear(config: HeadConfig, seed: int) -> nn.Module:
    c, h, w = _pooled(config)
    with seeded(seed):
        return nn.Sequential(
            OrderedDict(
                avgpool=nn.AdaptiveAvgPool2d((h, w)), flatten=nn.Flatten(), fc=nn.Linear(c * h * w, config.n_outputs)
            )
        )


def _mlp(config: HeadConfig, seed: int) -> nn.Module:
    c, h, w = _pooled(config)
    with seeded(seed):
        return nn.Sequential(
            OrderedDict(
                avgpool=nn.AdaptiveAvgPool2d((h, w)),
                flatten=nn.Flatten(),
                hidden=nn.Linear(c * h * w, HIDDEN),
                relu=nn.ReLU(),
                fc=nn.Linear(HIDDEN, config.n_outputs),
            )
        )


def _pooled(config: HeadConfig) -> tuple[int, int, int]:
    c, h, w = config.feature_shape
    return c, min(h, POOLED_SIDE), min(w, POOLED_SIDE)


def _map(config: HeadConfig, seed: int) -> nn.Module:
    """The feature is read at its own resolution, brought to that of the answer, and refined there."""
    assert config.answer_size is not None
    with seeded(seed):
        return nn.Sequential(
            OrderedDict(
                read=nn.Conv2d(config.feature_shape[0], MAP_WIDTH, 3, padding=1),
                relu1=nn.ReLU(),
                resize=nn.Upsample(config.answer_size, mode="bilinear"),
                refine=nn.Conv2d(MAP_WIDTH, MAP_WIDTH, 3, padding=1),
                relu2=nn.ReLU(),
                answer=nn.Conv2d(MAP_WIDTH, config.n_outputs, 3, padding=1),
            )
        )


HEAD_KINDS: Mapping[str, Callable[[HeadConfig, int], nn.Module]] = {
    "backbone": _rest_of_backbone,
    "linear": _linear,
    "mlp": _mlp,
    "map": _map,
}


def build_head(config: HeadConfig, *, seed: int) -> nn.Module:
    """A freshly initialised M_i: (B, C, H, W) to (B, n_outputs), or to a map (B, n_outputs, *answer_size).

    The process's random state is not touched.
    """
    return HEAD_KINDS[config.kind](config, seed)
