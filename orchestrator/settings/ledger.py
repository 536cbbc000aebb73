"""Of ``ledger.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from orchestrator.settings.shared import RuntimeSettings

_INLINE = tyro.conf.arg(name="")


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
