"""The settings of the command of sealed labels: what flags fill in. A field's docstring is its ``--help``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from orchestrator.settings.shared import DataSettings
from serve.tenants.moments import moment
from serve.tenants.registry import check_name
from serve.tenants.sealed_files import parse_public_key
from serve.tenants.settings import RegistryPlace

_INLINE = tyro.conf.arg(name="")

Subset = Literal["train", "validation", "test"]
"""Of those that a tenant is given labels of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CustodyPlace(RegistryPlace):
    """Where the custodian's files are."""

    custody_key: Path | None = None
    """The custodian's own key, which only its owner can read. Default: beside the registry. Elsewhere is better: who
    copies the storage folder then does not have it."""

    @property
    def key_path(self) -> Path:
        """Absolute."""
        return (self.custody_key or self.places.custody_key).expanduser().absolute()


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldLabels:
    """Which labels."""

    tenant: Annotated[str, tyro.conf.Positional]
    """Whose."""
    task: Annotated[str, tyro.conf.Positional]
    """Of which task."""
    subset: Annotated[Subset, tyro.conf.Positional]
    """Of which images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsKey:
    """The tenant: print the public key that labels are to be sealed to. The private one is made where there is none."""

    key_file: Annotated[Path, tyro.conf.Positional]
    """File of the private key; it stays with the tenant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsSeal(CustodyPlace):
    """The producer: seal labels to a tenant. It may have the file at once, and reads it when the key is released."""

    held: Annotated[HeldLabels, _INLINE]
    public_key: str
    """The tenant's, as `key` prints it."""
    not_before: str
    """When the key may be released: 12h or 2d from now on, or a date as 2027-01-31 or 2027-01-31T08:00 (UTC)."""
    out: Path
    """The file for the tenant."""
    data: Annotated[DataSettings, _INLINE] = DataSettings()

    def __post_init__(self) -> None:
        check_name("tenant", self.held.tenant)
        check_name("task", self.held.task)
        parse_public_key(self.public_key)
        moment(self.not_before, now=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsRelease(CustodyPlace):
    """The producer: give out what opens a tenant's labels, if its time has come. Only the tenant can use it."""

    held: Annotated[HeldLabels, _INLINE]
    out: Path
    """The file for the tenant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsOpen:
    """The tenant: open labels with one's own key and what was released."""

    sealed: Annotated[Path, tyro.conf.Positional]
    """The file that `seal` wrote."""
    released: Annotated[Path, tyro.conf.Positional]
    """The file that `release` wrote."""
    key_file: Path
    """File of the tenant's private key."""
    out: Path
    """Write the class indices here, as .npy, in the order of the subset's example ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsErase(CustodyPlace):
    """The producer: destroy what opens a tenant's labels. If it was not released, nobody can read them ever again."""

    held: Annotated[HeldLabels, _INLINE]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsList(CustodyPlace):
    """The producer: print what is held, and until when."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsSettings:
    """Labels that are sealed to a tenant, with a time before which nobody can read them."""

    command: Annotated[
        Annotated[LabelsKey, tyro.conf.subcommand("key")]
        | Annotated[LabelsSeal, tyro.conf.subcommand("seal")]
        | Annotated[LabelsRelease, tyro.conf.subcommand("release")]
        | Annotated[LabelsOpen, tyro.conf.subcommand("open")]
        | Annotated[LabelsErase, tyro.conf.subcommand("erase")]
        | Annotated[LabelsList, tyro.conf.subcommand("list")],
        _INLINE,
    ]
