"""What an encoder of a sweep is made by, and what it is known by: trials with the same recipe share it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from torch import Tensor

from orchestrator.assembly import TrainingData
from orchestrator.config import to_mapping
from orchestrator.models.modules import ModuleConfig
from orchestrator.network import NetworkConfig
from orchestrator.privacy.dp import DpConfig
from orchestrator.privacy.guarantee import Guarantee
from orchestrator.privacy.plan import DpPlan
from orchestrator.sweep.settings import SweepSettings
from orchestrator.sweep.space import Point, shown
from orchestrator.train_job import EncoderJob
from orchestrator.updates import make_plan

_VERSION: Final = 1
"""Of the recipe: with another one, encoders are not the same."""


class Need(NamedTuple):
    """Which encoder of the sweep."""

    split_index: int
    epsilon: float | None
    seed: int

    @classmethod
    def of(cls, point: Point) -> Need:
        """The encoder that a trial stands on. Nothing else of the point changes it."""
        return cls(point.split_index, point.epsilon, point.seed)

    @property
    def words(self) -> str:
        """For a line in the terminal."""
        return f"split {self.split_index}, epsilon {shown(self.epsilon)}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that one encoder's training depends on, but for the images and the noise."""

    need: Need
    private: str
    network: NetworkConfig
    dp: DpConfig
    n_train: int
    batch_size: int
    epochs: int
    config: Any = field(repr=False)
    key: str
    """Of the encoder in the store and in the catalog."""

    @classmethod
    def of(cls, settings: SweepSettings, need: Need, data: TrainingData) -> Recipe:
        """The recipe of one encoder, on these images in this split."""
        network = dataclasses.replace(settings.network, split_index=need.split_index)
        dp = dataclasses.replace(settings.dp, epsilon=need.epsilon)
        assert settings.private is not None
        parts = {
            "version": _VERSION,
            "data": data.fingerprint,
            "image_size": data.image_size,
            "flip": data.flip,
            "split": [settings.data.split_seed, list(settings.data.split), settings.data.group_by],
            "private": settings.private,
            # The stand-in takes the place of module and head where there is DP.
            "network": [
                network.backbone,
                network.split_index,
                *(() if need.epsilon else (network.module, network.head)),
            ],
            "dp": to_mapping(dp) if need.epsilon is not None else None,
            "training": to_mapping(settings.encoder),
            "seed": need.seed,
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return cls(
            need=need,
            private=settings.private,
            network=network,
            dp=dp,
            n_train=len(data.rows["train"]),
            batch_size=settings.encoder.batch_size,
            epochs=settings.encoder.epochs,
            config=settings.encoder,
            key=digest[:20],
        )

    @property
    def is_private(self) -> bool:
        """Whether its training is charged."""
        return self.need.epsilon is not None

    def plan(self, *, secret: int | None = None) -> DpPlan | None:
        """The mechanism; None without DP."""
        return make_plan(self.dp, n_train=self.n_train, batch_size=self.batch_size, epochs=self.epochs, secret=secret)

    def job(self, data: TrainingData, plan: DpPlan | None, *, device: str, threads: int) -> EncoderJob:
        """The training, as train.py does it."""
        return EncoderJob(
            data=only(data, self.private),
            network=self.network,
            config=self.config,
            plan=plan,
            surrogate_head=self.dp.surrogate,
            seed=self.need.seed,
            device=device,
            threads=threads,
        )


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A trained encoder, as trials read it from the store."""

    KIND = "sweep encoder"

    weights: Mapping[str, Tensor] = field(repr=False)
    guarantee: Guarantee
    private_module: tuple[ModuleConfig, Mapping[str, Tensor]] | None = field(default=None, repr=False)
    """Of the private attribute, where phase 1 trained it: without DP there is no stand-in."""

    def to_state(self) -> dict[str, Any]:
        """For `Store.write_state`."""
        module = None
        if self.private_module is not None:
            module = {"config": json.dumps(self.private_module[0].to_json()), "weights": dict(self.private_module[1])}
        return {"weights": dict(self.weights), "guarantee": json.dumps(self.guarantee.to_json()), "module": module}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Encoder:
        """Read what `to_state` wrote."""
        module = state["module"]
        return cls(
            weights=state["weights"],
            guarantee=Guarantee.from_json(json.loads(state["guarantee"])),
            private_module=None
            if module is None
            else (ModuleConfig.from_json(json.loads(module["config"])), module["weights"]),
        )


def encoder_file(key: str) -> str:
    """In the store."""
    return f"encoders/{key}.state"


def only(data: TrainingData, task: str) -> TrainingData:
    """The same images with one task's labels alone."""
    return dataclasses.replace(data, labels={task: data.labels[task]}, specs={task: data.specs[task]})
