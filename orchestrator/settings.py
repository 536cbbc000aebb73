"""The settings of whole commands: what flags and TOML presets fill in.

Flags have the names of the fields; a preset is TOML with one table a section. `tyro` builds the commands from these
classes, so a field's docstring is its ``--help``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from orchestrator.assembly import SessionConfig
from orchestrator.encoder_training import EncoderTrainingConfig
from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.network import BoundedNetworkConfig, NetworkConfig
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.dissimilarity import DissimilarityConfig, ModeName
from orchestrator.privacy.dp import DpBudget, DpConfig, DpMode
from orchestrator.privacy.similarity import MeasureName, RangeName
from orchestrator.shaping import Secret, ShapingPlan
from tasks.datasets import DatasetOptions
from tasks.datasets.splits import SplitFractions

DEFAULT_RATE_WEIGHT = 0.1
"""Measured to cost no accuracy, and to leave less for others to read; see docs/decisions/0014-bounded-features.md."""

_INLINE = tyro.conf.arg(name="")


def default_storage() -> Path:
    """``$METAMORPHOSIS_HOME``, or ``metamorphosis`` in the user's home.

    Never the working directory: that of a Ray job is a copy that is thrown away.
    """
    home = os.environ.get("METAMORPHOSIS_HOME")
    return Path(home) if home else Path.home() / "metamorphosis"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """Which images and labels."""

    data: str = "digits"
    """The data set: digits (bundled), or parquet:PATH with an `image` column of encoded images and label columns."""
    image_size: int = 64
    """Images are resized to this many pixels a side; the paper uses 64."""
    flip: bool | None = None
    """Mirror training images at random. Only where a mirrored image means the same for every task."""
    group_by: str | None = None
    """Keep rows with the same value of this column (a person, a driver) in one subset."""
    skip_corrupt: bool = False
    """Leave corrupt images out, count and name them, instead of refusing the file."""
    split: tuple[float, float, float, float] = (0.5, 0.1, 0.2, 0.2)
    """Shares of the train, validation, attacker and test subsets. They are disjoint."""
    split_seed: int = 0
    """Seed of the split. Every command on the same data must use the same one; add_task takes it from the catalog."""

    @property
    def options(self) -> DatasetOptions:
        """For `tasks.datasets.open_dataset`."""
        return DatasetOptions(flip=self.flip, group_by=self.group_by, skip_corrupt=self.skip_corrupt)

    @property
    def fractions(self) -> SplitFractions:
        """For `tasks.datasets.splits.split_rows`."""
        train, validation, attacker, test = self.split
        return SplitFractions(train=train, validation=validation, attacker=attacker, test=test)


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeSettings:
    """Where it runs, and where results go."""

    storage: Path | None = None
    """Folder for the feature cache, checkpoints and results; shared by all nodes of a cluster.
    Default: $METAMORPHOSIS_HOME, or ~/metamorphosis."""
    tracking_uri: str | None = None
    """MLflow tracking and registry. Default: $MLFLOW_TRACKING_URI, or a SQLite file in the storage folder."""
    catalog: str | None = None
    """Name under which encoders and tasks are published. Default: the data set's name."""
    address: str | None = None
    """Ray cluster to join. Default: $RAY_ADDRESS (set inside `ray job submit`), or a new local one."""
    engine: Literal["ray", "process"] = "ray"
    """ray: every party is an actor; process: all in this process, for debugging."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a GPU where there is one."""
    threads: int | None = None
    """PyTorch threads of each party. Default: all cores for the producer, an equal share for each consumer."""
    encoder_workers: int = 1
    """Ray Train workers that share each batch of phase 1. The result is the same, to rounding, and so is epsilon."""
    checkpoint_steps: int | None = None
    """Save a checkpoint after so many steps too, not only at the end of every epoch."""
    restarts: int = 3
    """How often parties that die are started again, between two checkpoints, before the run gives up."""
    ledger: Path | None = None
    """The privacy ledger: an SQLite file on a local disk. Default: ledger.db in the storage folder."""

    def __post_init__(self) -> None:
        if self.encoder_workers < 1:
            raise ConfigError(f"encoder_workers must be at least 1, got {self.encoder_workers}")
        if self.checkpoint_steps is not None and self.checkpoint_steps < 1:
            raise ConfigError(f"checkpoint_steps must be at least 1, got {self.checkpoint_steps}")
        if self.restarts < 0:
            raise ConfigError(f"restarts must be at least 0, got {self.restarts}")
        if self.encoder_workers > 1 and self.engine == "process":
            raise ConfigError("several encoder workers need Ray: leave --engine out, or --encoder-workers")

    @property
    def storage_path(self) -> Path:
        """Absolute."""
        return (self.storage or default_storage()).expanduser().absolute()

    @property
    def ledger_path(self) -> Path:
        """Absolute."""
        return (self.ledger or self.storage_path / "ledger.db").expanduser().absolute()

    @property
    def tracking(self) -> str:
        """The MLflow URI."""
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.storage_path}/mlflow.db"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """Train a private encoder (phase 1) and the tasks behind it (phase 2), and publish both.

    The producer keeps the images. Every task's tenant gets the features of its own task and nothing else.
    """

    data: Annotated[DataSettings, _INLINE] = DataSettings()
    private: str | None = None
    """The attribute to hide. Its module and classifier never leave the producer; no tenant can buy it."""
    tasks: tuple[str, ...] = ()
    """Tasks to train in parallel, as A,B,C."""
    algorithm: Literal["both", "task", "input"] = "both"
    """Algorithm 2's branch. both: input obfuscation, then task privacy against the frozen encoder; task: task privacy
    only, no DP, the encoder is trained jointly; input: input obfuscation only, no dissimilarity term."""
    phase: Literal["all", "encoder", "tasks"] = "all"
    """Run both phases, only phase 1 (publishes an encoder), or only phase 2 (on a published encoder)."""
    encoder_version: str = "latest"
    """Which published encoder to use with --phase tasks."""
    network: Annotated[NetworkConfig, _INLINE] = NetworkConfig()
    dp: Annotated[DpConfig, _INLINE] = DpConfig()
    task_privacy: Annotated[TaskPrivacySettings, _INLINE] = TaskPrivacySettings()
    encoder: EncoderTrainingConfig = EncoderTrainingConfig()
    training: Annotated[SessionConfig, _INLINE] = SessionConfig()
    seed: int = 0
    """Of initial weights, batches and mirroring. DP's noise comes from the operating system (see --noise-seed)."""
    resume: bool = False
    """Go on with the newest interrupted run of the same settings, from its newest whole checkpoint."""
    runtime: Annotated[RuntimeSettings, _INLINE] = RuntimeSettings()

    def __post_init__(self) -> None:
        if len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"a task is named twice in --tasks {','.join(self.tasks)}")
        if self.private is not None and self.private in self.tasks:
            raise ConfigError(
                f"{self.private!r} is the private attribute and also in --tasks: "
                "an attribute is either hidden or sold; take it out of one of the two"
            )
        if self.phase != "tasks":  # otherwise the encoder is a published one
            _ = self.task_privacy.network(self.network).task_shape(self.data.image_size)  # or cells do not fit
        if not self.tasks and self.phase != "encoder":
            raise ConfigError(
                "no task to train: name at least one with --tasks, or train only the encoder: --phase encoder"
            )
        if self.algorithm == "both" and self.private is None and self.phase != "tasks":
            raise ConfigError(
                "--algorithm both trains the encoder on a private attribute: name it with --private, "
                "or choose --algorithm task (no DP) or --algorithm input"
            )
        if self.algorithm == "task" and self.dp.epsilon is not None:
            raise ConfigError(
                "--algorithm task trains the encoder without differential privacy: leave --epsilon out, "
                "or choose --algorithm both"
            )
        if self.algorithm == "task" and self.phase != "all":
            raise ConfigError("--algorithm task trains encoder and tasks together: leave --phase out")
        if self.dp.epsilon is None and self.dp.dp_mode not in {"surrogate_then_freeze", "encoder_only_paper"}:
            raise ConfigError(f"--dp-mode {self.dp.dp_mode} trains with differential privacy: give --epsilon")
        if self.algorithm == "input" and self.dp.epsilon is None:
            raise ConfigError("--algorithm input obfuscates with differential privacy: give --epsilon")
        if self.dp.dp_mode == "surrogate_dp_modules":
            self.task_privacy.check_without_shaping("choose another --dp-mode")
        if self.algorithm == "input" and self.task_privacy.channel is not None:
            raise ConfigError("--algorithm input has no privacy between tasks: choose --algorithm both or task")
        if self.algorithm == "input" and self.task_privacy.dissimilarity.omega > 0:
            raise ConfigError("--algorithm input has no dissimilarity term: give --omega 0, or choose --algorithm both")


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteSettings:
    """A tenant that trains its head in a process of its own, wherever that is; see `serve.edge.train`."""

    remote: str | None = None
    """HOST:PORT where the tenant's process finds this command; it is waited for. The tenant keeps its head, and the
    task is published without one."""
    remote_certificate: Path | None = None
    """PEM file of the certificate for that address. Without one the connection is plain HTTP."""
    remote_key: Path | None = None
    """PEM file of the certificate's key."""
    remote_patience_s: float = 600.0
    """So many seconds may pass without a word of the tenant before it counts as lost."""
    tenants: Path | None = None
    """The tenants' registry, which says whose token may train what. Default: tenants/registry.db in the storage."""

    def __post_init__(self) -> None:
        if not self.remote_patience_s > 0:
            raise ConfigError(f"remote_patience_s must be > 0, got {self.remote_patience_s}")
        if self.remote is None and (self.remote_certificate is not None or self.remote_key is not None):
            raise ConfigError("--remote-certificate and --remote-key are of --remote HOST:PORT: give it, or leave them")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportHeadSettings:
    """Write a published head as an ONNX file for the edge client, checked against the one in torch.

    A tenant that trained its head elsewhere has it already: serve.edge.train writes the same kind of file.
    """

    task: Annotated[str, tyro.conf.Positional]
    """The published task."""
    data: str | None = None
    """Names the catalog by its data set, where there are several."""
    encoder_version: str = "latest"
    """Which published encoder."""
    out: Path | None = None
    """The file to write. Default: heads/TASK-VERSION.onnx in the storage folder."""
    runtime: Annotated[RuntimeSettings, _INLINE] = RuntimeSettings()


@dataclass(frozen=True, kw_only=True, slots=True)
class AddTaskSettings:
    """Add one task to a published encoder, without touching the tasks that are already there.

    Data set, split and networks are those of the encoder, from the catalog.
    """

    task: Annotated[str, tyro.conf.Positional]
    """The task to add."""
    data: str | None = None
    """Where the data set is now, if not where the encoder found it. The content must be the same."""
    encoder_version: str = "latest"
    """Which published encoder."""
    head: str | None = None
    """The tenant's head: backbone, linear or mlp. Default: as the tasks of that encoder, and mlp in place of backbone
    with bounded features."""
    module: str | None = None
    """The metamorphosis module. Default: as the tasks of that encoder."""
    dp: Annotated[DpBudget, _INLINE] = DpBudget()
    """With an epsilon the module is trained under DP, with a stand-in head that is thrown away, at that cost beside
    what the encoder cost. Without one, only the encoder is covered."""
    task_privacy: Annotated[TaskPrivacySettings, _INLINE] = TaskPrivacySettings()
    training: Annotated[SessionConfig, _INLINE] = SessionConfig()
    remote: Annotated[RemoteSettings, _INLINE] = RemoteSettings()
    seed: int = 0
    """Of initial weights, batches and mirroring."""
    resume: bool = False
    """Go on with the newest interrupted run of the same settings, from its newest whole checkpoint."""
    runtime: Annotated[RuntimeSettings, _INLINE] = RuntimeSettings()

    def __post_init__(self) -> None:
        if self.task_privacy.channel is None:
            return
        if self.dp.epsilon is not None:
            self.task_privacy.check_without_shaping("leave --epsilon out")
        if self.head == "backbone":
            raise ConfigError(
                "the rest of the backbone takes no bounded feature, which is a short vector: choose --head mlp or "
                "linear, or leave --head out"
            )


EVALUATION_PARTS = ("leakage", "reconstruction", "membership", "hijack")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSettings:
    """Measure what each task's tenant can learn from its features that it did not buy, and write a report of it.

    The paper's swap test, and attackers that are trained afresh on the features, beside chance and the floor that the
    labels' own correlation sets; how well the images themselves can be got back; who was in the training set; and what
    a tenant gains that sends false gradients.
    """

    data: str | None = None
    """Where the data set is now, if not where the encoder found it."""
    encoder_version: str = "latest"
    """Which published encoder."""
    budget: Literal["quick", "full"] = "quick"
    """How hard attackers try. quick: a few kinds, once each, without hijacking, in a minute on small data; full: every
    kind, three times each, on more rows, tenants that collude included, which takes from minutes to hours."""
    parts: tuple[str, ...] = ()
    """Only these parts, as A,B,C: leakage, reconstruction, membership, hijack. Default: all of the budget."""
    attacks: tuple[str, ...] = ()
    """Only these attackers of labels, as A,B,C: linear, mlp, cnn ... Default: all of the budget."""
    alone: int = 0
    """Also train each task's network alone, without any privacy, for this many epochs, and print its accuracy."""
    ceiling: int = 0
    """Also measure what could be read of each target if nothing were held back, so that weak attackers show: by the
    same attackers on the universal feature, and by a network trained on the images for this many epochs."""
    targets: tuple[str, ...] = ()
    """Attributes to attack, as A,B,C. Default: every task of the encoder and the private attribute."""
    seeds: int | None = None
    """Attackers are trained with this many seeds. Default: 1 for quick, 3 for full; a claim of privacy needs 3."""
    seed: int = 0
    """Of the attackers' weights and batches."""
    pictures: bool = False
    """Draw reconstructions and inputs although they may show people. Pictures of data sets without people (digits) are
    always drawn; of others only where those shown, and the terms of the data, allow it."""
    beside: tuple[str, ...] = ()
    """Folders of earlier evaluations, of other encoders on the same data, as A,B,C: the report then has curves over
    epsilon, omega and split index."""
    out: Path | None = None
    """Folder for the report, its figures and evaluation.json. Default: a new one in the storage folder."""
    runtime: Annotated[RuntimeSettings, _INLINE] = RuntimeSettings()

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in EVALUATION_PARTS:
                raise UnknownNameError("part", part, EVALUATION_PARTS)
        if len(set(self.parts)) != len(self.parts):
            raise ConfigError(f"a part is named twice in --parts {','.join(self.parts)}")
        if self.parts and "leakage" not in self.parts and (self.alone or self.ceiling or self.attacks):
            raise ConfigError("--alone, --ceiling and --attacks belong to the part leakage: add it to --parts")
        if self.alone < 0 or self.ceiling < 0:
            raise ConfigError(f"--alone and --ceiling are numbers of epochs, got {self.alone} and {self.ceiling}")

    @property
    def compared(self) -> tuple[Path, ...]:
        """`beside`, as paths."""
        return tuple(Path(folder).expanduser() for folder in self.beside)

    @property
    def chosen(self) -> frozenset[str]:
        """The parts that are measured."""
        return frozenset(self.parts or EVALUATION_PARTS) - ({"hijack"} if self.budget == "quick" else set())


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditSettings:
    """Try out what the guarantees say: train many times with and without one canary, and tell the two apart.

    Prints a lower bound on epsilon beside the claim, for every mode of differential privacy, and whether three faults
    are seen: the noise off, the clip removed, and a head that learns without noise. Nothing is read or published. Ends
    with status 1 if a claim does not hold or a fault is not seen.
    """

    modes: tuple[str, ...] = get_args(DpMode)
    """Which modes, as A,B,C. Noise and clip are taken from the first that guarantees something."""
    epsilon: float = 4.0
    """The epsilon that every training claims."""
    runs: int = 1000
    """Trainings with the canary, and as many without, for each row. More of them show more."""
    confidence: float = 0.95
    """Of each bound."""
    seed: int | None = None
    """Makes the audit repeatable. Default: fresh noise and batches from the operating system."""
    processes: int | None = None
    """Trainings at a time. Default: as many as there are cores, up to 8."""
    out: Path | None = None
    """Write the numbers to this JSON file, too."""

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in get_args(DpMode):
                raise UnknownNameError("mode", mode, get_args(DpMode))
        if not self.modes or len(set(self.modes)) != len(self.modes):
            raise ConfigError(f"--modes {','.join(self.modes)!r} must name each mode once, and one at least")
        if self.runs < 2:
            raise ConfigError(f"runs must be at least 2, got {self.runs}: half of them choose the attacker's threshold")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence must be > 0 and < 1, got {self.confidence}")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"seed must be >= 0, got {self.seed}")
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"processes must be at least 1, got {self.processes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerPlace:
    """Where the ledger is."""

    storage: Path | None = None
    """The storage folder of the commands that train. Default: $METAMORPHOSIS_HOME, or ~/metamorphosis."""
    ledger: Path | None = None
    """The ledger's file. Default: ledger.db in the storage folder."""

    @property
    def path(self) -> Path:
        """Absolute."""
        return RuntimeSettings(storage=self.storage, ledger=self.ledger).ledger_path


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerShow(LedgerPlace):
    """Print what was spent on the images of every data set, by which training, and what is left."""

    data: Annotated[str | None, tyro.conf.Positional] = None
    """Only this data set: a name or the beginning of a fingerprint, as `show` prints them, digits, or parquet:PATH."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLimit(LedgerPlace):
    """Set what all trainings on the images of a data set may cost together. One that would pass it is refused."""

    data: Annotated[str, tyro.conf.Positional]
    """The data set: a name or the beginning of a fingerprint, as `show` prints them, digits, or parquet:PATH."""
    epsilon: float
    """The most that may be spent."""
    delta: float
    """At which epsilon is computed. Well below 1 / number of images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerExport(LedgerPlace):
    """Write everything in the ledger as JSON."""

    out: Annotated[Path, tyro.conf.Positional]
    """The file to write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerRelease(LedgerPlace):
    """Give back what an interrupted training reserved and did not use. It can then not be resumed."""

    reservation: Annotated[int, tyro.conf.Positional]
    """Its number, as `show` prints it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerSettings:
    """The privacy ledger: what was ever spent on the images of a data set, and what may still be."""

    command: Annotated[
        Annotated[LedgerShow, tyro.conf.subcommand("show")]
        | Annotated[LedgerLimit, tyro.conf.subcommand("limit")]
        | Annotated[LedgerExport, tyro.conf.subcommand("export")]
        | Annotated[LedgerRelease, tyro.conf.subcommand("release")],
        _INLINE,
    ]
