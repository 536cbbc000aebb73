"""What every command asks for: which images, and where it runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.errors import ConfigError
from tasks.datasets import DatasetOptions
from tasks.datasets.splits import SplitFractions


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
