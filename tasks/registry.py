"""Looking a name up in a registry: a dictionary that is written out in one place."""

from collections.abc import Mapping
from typing import TypeVar

from tasks.errors import UnknownNameError

T = TypeVar("T")


def look_up(registry: Mapping[str, T], kind: str, name: str) -> T:
    """What ``registry`` holds under ``name``. Raises `UnknownNameError`, which lists the known names."""
    if name not in registry:
        raise UnknownNameError(kind, name, registry)
    return registry[name]
