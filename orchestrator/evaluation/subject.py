"""What was evaluated: data, encoder, tasks, ledger and software, as a report states them."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from orchestrator.catalog_records import EncoderRecord, TaskRecord
from orchestrator.evaluation.collect import Published
from orchestrator.privacy.guarantee import Guarantee
from orchestrator.privacy.ledger import Account

_PACKAGES = ("metamorphosis-ray", "torch", "torchvision", "opacus", "ray", "mlflow", "numpy", "scikit-learn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One published encoder with its tasks, on the data that it was trained on."""

    catalog: str
    encoder: EncoderRecord
    tasks: Mapping[str, TaskRecord]
    data_name: str
    sizes: Mapping[str, int]
    """Images of each subset."""
    account: Account | None = field(repr=False)
    """What the privacy ledger says of these images; None where there is no ledger, or not a word in it."""
    command: str
    """By which the evaluation was started."""
    created: str
    """UTC, ISO 8601."""
    versions: Mapping[str, str]
    """Of Python and of the packages that numbers depend on."""

    @classmethod
    def of(cls, published: Published, *, catalog: str, account: Account | None, command: str, created: str) -> Subject:
        """Of what was collected."""
        return cls(
            catalog=catalog,
            encoder=published.encoder,
            tasks=published.records,
            data_name=published.opened.table.name,
            sizes={subset: len(rows) for subset, rows in published.rows.items()},
            account=account,
            command=command,
            created=created,
            versions=installed_versions(),
        )

    def command_for(self, part: str) -> str:
        """The command that measures one part again, of this encoder even where it is not the latest any more."""
        given = shlex.split(self.command)
        asked = {word.partition("=")[0] for word in given}
        added = {"--catalog": self.catalog, "--encoder-version": self.encoder.version, "--parts": part}
        more = [word for flag, value in added.items() if flag not in asked for word in (flag, value)]
        return shlex.join([*given, *more])

    @property
    def sold(self) -> tuple[str, ...]:
        """Tasks whose features somebody receives."""
        return tuple(task for task, record in self.tasks.items() if not record.private)

    @property
    def guarantee(self) -> Guarantee:
        """The encoder's."""
        return Guarantee.from_json(dict(self.encoder.guarantee))

    @property
    def statements(self) -> Mapping[str, str]:
        """What each published task carries with it, as it was said at publication."""
        return {task: record.guarantee_text for task, record in self.tasks.items()}

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "catalog": self.catalog,
            "data": {"name": self.data_name, "sizes": dict(self.sizes)},
            "encoder": self.encoder.to_json(),
            "guarantee": self.guarantee.statement(),
            "tasks": {task: record.to_json() for task, record in self.tasks.items()},
            "ledger": None if self.account is None else self.account.to_json(),
            "command": self.command,
            "created": self.created,
            "versions": dict(self.versions),
        }


def installed_versions() -> dict[str, str]:
    """Package to version; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
