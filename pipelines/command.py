"""What every command shares: flags and presets in, one readable error line and an exit status out.

Exit status: 0 done; 2 what was asked for cannot be done, the message says what can; 1 the run failed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.memory import keep_freed_memory
from tasks.errors import MetaMorphosisError, UnknownNameError

if TYPE_CHECKING:
    from rich.console import Console

PRESETS = Path(__file__).parent / "presets"
INTERRUPTED = 130

T = TypeVar("T")


def main(settings: str, run: Callable[[Any], None], *, prog: str, presets: bool = False) -> None:
    """Parse ``sys.argv`` into settings, run the command, and exit with its status.

    ``settings`` names a class as ``module:Class``. It is imported here: without the cluster's packages the user gets
    one line that says what to install.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    keep_freed_memory()
    raise SystemExit(execute(settings, run, sys.argv[1:], prog=prog, presets=presets))


def execute(settings: str, run: Callable[[Any], None], argv: Sequence[str], *, prog: str, presets: bool = False) -> int:
    """`main` without the process: returns the exit status."""
    _quieten()
    try:
        run(parse(_settings_class(settings), argv, prog=prog, presets=presets))
    except KeyboardInterrupt as error:
        told = "interrupted: nothing was published after the last line above; what was published is whole"
        _say(_with_notes(told, error))
        return INTERRUPTED
    except MetaMorphosisError as error:
        _say(_with_notes(f"error: {error}", error))
        return error.exit_code
    except OSError as error:
        told = f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        _say(_with_notes(told, error))
        return 1
    except Exception:
        traceback.print_exc()
        _say("error: this is a fault in the program, not in what was asked; the trace above says where")
        return 1
    return 0


def _settings_class(name: str) -> type[Any]:
    module, _, kind_name = name.partition(":")
    try:
        settings = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] in {"orchestrator", "tasks"}:
            raise
        from orchestrator.errors import MissingExtraError

        raise MissingExtraError("cluster", str(error.name)) from error
    kind: type[Any] = getattr(settings, kind_name)
    return kind


def parse(kind: type[T], argv: Sequence[str], *, prog: str, presets: bool = False) -> T:
    """Flags over a preset over the defaults. Exits with status 2 on an unknown flag or a value of the wrong type."""
    import tyro

    from orchestrator.config import read_toml

    default: Any = tyro.MISSING_NONPROP
    arguments = list(argv)
    epilog = ""
    if presets:
        before = argparse.ArgumentParser(add_help=False, prog=prog, allow_abbrev=False)
        before.add_argument("--preset")
        chosen, arguments = before.parse_known_args(arguments)
        if chosen.preset is not None:
            default = read_toml(kind, preset_path(chosen.preset))
        epilog = f"\n\n--preset NAME starts from presets/NAME.toml or a TOML file: {', '.join(preset_names())}."
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_comma_separated)
    options: dict[str, Any] = {} if default is tyro.MISSING_NONPROP else {"default": default}
    settings: T = tyro.cli(
        kind,
        prog=prog,
        args=arguments,
        description=inspect.cleandoc(kind.__doc__ or "") + epilog,
        registry=registry,
        **options,
    )
    return settings


def open_console(*, width: int) -> Console:
    """Where a command prints. ``width`` is for output that is no terminal: tables in a log should not be folded."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else width)


def preset_names() -> list[str]:
    """The presets that come with the project."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_path(name: str) -> Path:
    """Of a preset by name, or of a TOML file by path."""
    if name.endswith(".toml") or "/" in name:
        return Path(name)
    if name not in preset_names():
        raise UnknownNameError("preset", name, preset_names())
    return PRESETS / f"{name}.toml"


def _comma_separated(info: Any) -> Any:
    """``--tasks a,b`` for a tuple of names."""
    import tyro

    if typing.get_origin(info.type) is not tuple or typing.get_args(info.type) != (str, ...):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="A,B,...",
        instance_from_str=lambda given: tuple(name.strip() for name in given[0].split(",") if name.strip()),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(value)],
    )


def _interrupt(signum: int, frame: object) -> None:
    """SIGTERM, as `ray job stop` sends it, ends a run as Ctrl-C does."""
    raise KeyboardInterrupt


def _quieten() -> None:
    """Libraries' notices that say nothing to the user of a command. Errors and warnings of our own stay."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def _with_notes(line: str, error: BaseException) -> str:
    """The line, and what those through whose hands the error passed have to say about it."""
    return ". ".join([line, *getattr(error, "__notes__", [])])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
