"""What a version of a served task is called: in metadata, with every feature, and in the head that takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from orchestrator.catalog_records import TaskRecord

HASH_DIGITS: Final = 12


def served_version(record: TaskRecord) -> str:
    """``<encoder>.<publication>-<hash>``: the publication, and the weights of its module.

    The number alone may come again, where a catalog is begun anew.
    """
    return f"{record.version}-{record.module_sha256[:HASH_DIGITS]}"
