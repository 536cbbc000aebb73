"""The settings of a sweep: those of a training, and what is varied."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import tyro

from orchestrator.assembly import SessionConfig
from orchestrator.encoder_training import EncoderTrainingConfig
from orchestrator.errors import ConfigError
from orchestrator.network import NetworkConfig
from orchestrator.privacy.dp import DpConfig
from orchestrator.settings.shared import DataSettings, RuntimeSettings
from orchestrator.settings.task_privacy import TaskPrivacySettings
from orchestrator.settings.train import TrainSettings
from orchestrator.sweep.objectives import Objective, chosen_objectives
from orchestrator.sweep.space import Dimension, Point, Space, parse_dimension
from orchestrator.sweep.store import is_url

_INLINE = tyro.conf.arg(name="")
_UNBOUNDED: Final[Mapping[str, Any]] = {
    "feature_bits": None,
    "feature_dimensions": None,
    "feature_noise": None,
    "feature_cells": 1,
    "feature_noise_kind": "keyed",
    "rate_weight": None,
    "named_secrets": (),
}
"""What the settings of bounded features are where features are not bounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaceSettings:
    """What is varied: values as A,B,C, or a range as uniform:LOW:HIGH or loguniform:LOW:HIGH."""

    omega: str | None = None
    """Weights of the dissimilarity term. Default: --task-privacy.omega."""
    epsilon: str | None = None
    """Privacy budgets of the encoder, for instance 1,2,4,none. Default: --dp.epsilon."""
    split_index: str | None = None
    """Where the backbone is cut, for instance 5,6,7. Default: --network.split-index."""
    feature_bits: str | None = None
    """Bits that a feature may carry, for instance 2,4,none. Default: --task-privacy.feature-bits."""
    seeds: str = "0"
    """Every configuration is trained with each of these seeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRuntime:
    """Where a sweep runs, and where results go."""

    storage: str | None = None
    """Folder, or fsspec URL (s3://bucket/x, gs://..., file:///mounted/everywhere), for encoders and results. A Ray
    cluster of several nodes needs a URL. Default: $METAMORPHOSIS_HOME, or ~/metamorphosis."""
    tracking_uri: str | None = None
    """MLflow tracking and registry. Default: $MLFLOW_TRACKING_URI, or a SQLite file in the storage folder."""
    catalog: str | None = None
    """Name under which encoders are published. Default: the data set's name and -sweep."""
    address: str | None = None
    """Ray cluster to join. Default: $RAY_ADDRESS (set inside `ray job submit`), or a new local one."""
    engine: Literal["ray", "process"] = "ray"
    """ray: trials side by side, by Ray Tune; process: one after the other in this process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a GPU where there is one."""
    threads: int = 1
    """PyTorch threads of each trial."""
    trial_cpus: float = 1.0
    """CPUs that each trial and each training of an encoder reserves."""
    trial_gpus: float | None = None
    """GPUs that each reserves; 0.25 lets four share one. Default: one where there are any, unless --device cpu."""
    concurrency: int | None = None
    """Trials at a time. Default: as many as the cluster has room for."""
    ledger: Path | None = None
    """The privacy ledger: an SQLite file on the driver's local disk. Default: ledger.db in the storage folder."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}")
        if not self.trial_cpus > 0:
            raise ConfigError(f"trial_cpus must be > 0, got {self.trial_cpus}")
        if self.trial_gpus is not None and self.trial_gpus < 0:
            raise ConfigError(f"trial_gpus must be >= 0, got {self.trial_gpus}")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {self.concurrency}")

    @property
    def is_remote(self) -> bool:
        """Whether results go to a URL."""
        return self.storage is not None and is_url(self.storage)

    @property
    def local(self) -> RuntimeSettings:
        """Of the driver: where its ledger, its secrets and its tracking are."""
        return RuntimeSettings(
            storage=None if self.storage is None or self.is_remote else Path(self.storage),
            tracking_uri=self.tracking_uri,
            catalog=self.catalog,
            address=self.address,
            engine=self.engine,
            device=self.device,
            threads=self.threads,
            ledger=self.ledger,
        )

    @property
    def shared(self) -> str:
        """Where results go: a URL, or an absolute path."""
        return str(self.storage).rstrip("/") if self.is_remote else str(self.local.storage_path)

    @property
    def in_a_trial(self) -> RuntimeSettings:
        """What a trial's own training runs with."""
        return RuntimeSettings(engine="process", device=self.device, threads=self.threads)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSettings:
    """Try out omega, epsilon, split index and feature bits on your own data, and print which no other choice beats.

    An encoder is trained once for all trials that share it, and charged once. The settings of a training are those of
    train.py, so its presets are good here too: what is not varied is as they say. The plan, with what it costs
    altogether, is printed before anything runs; what would pass the privacy budget is refused.
    """

    space: Annotated[SpaceSettings, _INLINE] = SpaceSettings()
    search: Literal["grid", "random", "optuna"] = "grid"
    """grid: every combination; random: --trials of them; optuna: --trials, each chosen in the light of the ones before,
    for all objectives at once."""
    trials: int | None = None
    """How many configurations random and optuna try."""
    objectives: tuple[str, ...] = ("utility", "leakage", "epsilon")
    """What counts, as A,B,C: utility, leakage, epsilon, bytes, head_mb, step_time, latency. Without leakage no attacker
    is trained, which takes most of the time."""
    asha: bool = False
    """Stop trials early whose utility is behind that of others after as many epochs (ASHA). It looks at utility alone,
    so it may stop what is private and would have been on the front."""
    search_seed: int = 0
    """Of random and optuna."""
    ceilings: bool = False
    """Also attack the universal feature of each encoder, once: what could be read if nothing were held back."""
    data: Annotated[DataSettings, _INLINE] = DataSettings()
    private: str | None = None
    """The attribute to hide: encoders are trained on it, and leakage is measured on it."""
    tasks: tuple[str, ...] = ()
    """Tasks to train in every trial, as A,B,C."""
    network: NetworkConfig = NetworkConfig()
    dp: DpConfig = DpConfig()
    task_privacy: TaskPrivacySettings = TaskPrivacySettings()
    encoder: EncoderTrainingConfig = EncoderTrainingConfig()
    training: Annotated[SessionConfig, _INLINE] = SessionConfig()
    register: bool = False
    """Publish the best trial of each objective in the catalog, under the alias best-OBJECTIVE."""
    report: bool = False
    """Write the result as an HTML page, too."""
    resume: bool = False
    """Go on with the newest interrupted sweep of the same settings. No trial that was finished is done again."""
    out: Path | None = None
    """Folder for sweep.json, sweep.parquet, figures and the report. Default: a new one in the storage folder."""
    runtime: Annotated[SweepRuntime, _INLINE] = SweepRuntime()

    def check(self) -> None:
        """Raise `ConfigError` for what contradicts itself.

        Not when it is made: a preset, to which flags are added, need not be a sweep yet.
        """
        _ = self.chosen, self.searched
        if not self.tasks:
            raise ConfigError("no task to train: name at least one with --tasks")
        if self.private is None:
            raise ConfigError(
                "no attribute to measure leakage on: encoders are trained on the private attribute, and attackers "
                "look for it in the features. Name it with --private"
            )
        if self.dp.dp_mode != "surrogate_then_freeze":
            raise ConfigError(
                f"a sweep trains its encoders with --dp-mode surrogate_then_freeze, got {self.dp.dp_mode}: only an "
                "encoder that is finished before any task begins can be shared by trials"
            )
        if self.asha and self.training.epochs < 2:
            raise ConfigError("--asha stops trials between epochs: train for 2 epochs at least")
        if self.asha and "utility" not in self.objectives:
            raise ConfigError("--asha stops trials by their utility: add utility to --objectives, or leave --asha out")
        if self.asha and self.runtime.engine == "process":
            raise ConfigError("--asha compares trials that run side by side: leave --engine out")
        self._check_search()

    def _check_search(self) -> None:
        if self.search == "grid" and self.searched.ranges:
            names = ", ".join("--" + d.name.replace("_", "-") for d in self.searched.ranges)
            raise ConfigError(f"a grid needs values, and {names} is a range: list values, or choose --search random")
        if self.search == "grid" and self.trials is not None:
            raise ConfigError("--search grid tries every combination: leave --trials out, or choose --search random")
        if self.search != "grid" and (self.trials is None or self.trials < 1):
            raise ConfigError(f"--search {self.search} needs to know how many to try: give --trials, 1 or more")
        if self.search == "optuna" and len(self.searched.seed.values) > 1:
            raise ConfigError(
                "--search optuna trains each configuration once: give one seed, or choose --search random"
            )
        if not self.searched.swept and not self.searched.seed.varies:
            raise ConfigError(
                "the space is a single point: give two values at least to one of --omega, --epsilon, --split-index, "
                "--feature-bits or --seeds; for one training there is train.py"
            )

    @property
    def chosen(self) -> tuple[Objective, ...]:
        """The objectives."""
        return chosen_objectives(self.objectives)

    @property
    def searched(self) -> Space:
        """All dimensions; those that are not swept as the training's own settings say."""
        space = self.space

        def dimension(name: str, text: str | None, otherwise: Any) -> Dimension:
            return Dimension(name=name, values=(otherwise,)) if text is None else parse_dimension(name, text)

        return Space(
            omega=dimension("omega", space.omega, self.task_privacy.omega),
            epsilon=dimension("epsilon", space.epsilon, self.dp.epsilon),
            split_index=dimension("split_index", space.split_index, self.network.split_index),
            feature_bits=dimension("feature_bits", space.feature_bits, self.task_privacy.feature_bits),
            seed=parse_dimension("seed", space.seeds),
        )

    def training_of(self, point: Point) -> TrainSettings:
        """What train.py would be asked for. Raises `ConfigError` for a combination that it refuses."""
        return TrainSettings(
            data=self.data,
            private=self.private,
            tasks=self.tasks,
            algorithm="both",
            network=dataclasses.replace(self.network, split_index=point.split_index),
            dp=dataclasses.replace(self.dp, epsilon=point.epsilon),
            task_privacy=self._task_privacy(point),
            encoder=self.encoder,
            training=self.training,
            seed=point.seed,
            runtime=self.runtime.in_a_trial,
        )

    def _task_privacy(self, point: Point) -> TaskPrivacySettings:
        base = self.task_privacy
        if point.feature_bits is None and self.space.feature_bits is not None:
            base = dataclasses.replace(base, task_privacy="dissimilarity", **_UNBOUNDED)
        elif point.feature_bits is not None:
            base = dataclasses.replace(
                base,
                task_privacy="bounded",
                feature_bits=point.feature_bits,
                feature_dimensions=None,
                feature_noise=None,
            )
        return base if point.omega is None else dataclasses.replace(base, omega=point.omega)

    def resolved(self, point: Point) -> Point:
        """The same point, with the omega that its kind of feature has where none was named."""
        return dataclasses.replace(point, omega=self.training_of(point).task_privacy.dissimilarity.omega)

    @property
    def identity(self) -> SweepSettings:
        """What must be the same in an attempt that goes on with this one; where it runs may change."""
        return dataclasses.replace(self, report=False, out=None)
