"""Settings as frozen values: strict reading from and writing to TOML.

Every setting lives in a dataclass beside the code that it configures. An unknown key, a missing one or a value of the
wrong type raises `ConfigError` with the path of the key.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import ConfigError, MetaMorphosisError

T = TypeVar("T")


def read_toml(cls: type[T], path: Path) -> T:
    """Read one settings dataclass from a TOML file."""
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return from_mapping(cls, data, where=path.name)


def from_mapping(cls: type[T], data: Mapping[str, Any], *, where: str) -> T:
    """Build a settings dataclass from nested mappings, as TOML and JSON give them."""
    import cattrs
    from cattrs.gen import make_dict_structure_fn

    converter = cattrs.Converter(forbid_extra_keys=True)
    for scalar in (int, float, str, bool):
        converter.register_structure_hook(scalar, _strict(scalar))

    def forbid_extra(kind: Any) -> Any:
        return make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)

    converter.register_structure_hook_factory(dataclasses.is_dataclass, forbid_extra)
    converter.register_structure_hook_factory(_is_optional, lambda kind: _optional(kind, converter))
    try:
        return converter.structure(dict(data), cls)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except cattrs.BaseValidationError as error:
        lines = cattrs.transform_error(error, path=where, format_exception=_in_words)
        problems = "; ".join(_explain(cls, line) for line in lines)
        raise ConfigError(problems) from error


def to_mapping(value: Any) -> dict[str, Any]:
    """Nested plain dictionaries of a settings dataclass, without the fields that are None (TOML has no null)."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {k: plain(v) for k, v in item.items() if v is not None}
        if isinstance(item, (tuple, list)):
            return [plain(v) for v in item]
        return str(item) if isinstance(item, Path) else item

    result: dict[str, Any] = plain(dataclasses.asdict(value))
    return result


def to_toml(value: Any) -> str:
    """The TOML text that `read_toml` reads back to an equal value."""
    import tomli_w

    return tomli_w.dumps(to_mapping(value))


def flatten(value: Any) -> dict[str, str]:
    """``section.key`` to text, for a tracker's parameters."""

    def walk(prefix: str, item: Any) -> dict[str, str]:
        if isinstance(item, dict):
            found: dict[str, str] = {}
            for key, child in item.items():
                found |= walk(f"{prefix}.{key}" if prefix else key, child)
            return found
        return {prefix: ",".join(map(str, item)) if isinstance(item, (list, tuple)) else str(item)}

    return walk("", dataclasses.asdict(value))


def _strict(scalar: type) -> Any:
    def structure(value: Any, _: Any) -> Any:
        if scalar is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if type(value) is not scalar:
            raise TypeError(f"expected {scalar.__name__}, got {value!r}")
        return value

    return structure


def _is_optional(kind: Any) -> bool:
    return typing.get_origin(kind) in {typing.Union, types.UnionType} and type(None) in typing.get_args(kind)


def _optional(kind: Any, converter: Any) -> Any:
    (inner,) = [a for a in typing.get_args(kind) if a is not type(None)]
    return lambda value, _: None if value is None else converter.structure(value, inner)


def _in_words(error: BaseException, kind: type | None) -> str:
    """Our own errors speak for themselves; cattrs' are put into words by cattrs."""
    from cattrs.v import format_exception

    return str(error) if isinstance(error, MetaMorphosisError) else format_exception(error, kind)


def _explain(cls: Any, line: str) -> str:
    """cattrs' message, with the keys that are allowed at that place."""
    if "extra fields found" not in line:
        return line
    path = line.rsplit("@", 1)[-1].strip().split(".")[2:]
    here = cls
    for part in path:
        here = typing.get_type_hints(here).get(part, here)
    known = ", ".join(sorted(f.name for f in dataclasses.fields(here))) if dataclasses.is_dataclass(here) else "?"
    return f"{line.replace('extra fields found', 'unknown key')}; known keys: {known}"
