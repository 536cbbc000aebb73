"""The cells of the kill matrix: which command is run, what befalls it, and how each start of it is to end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

PHASES: Final = ("forward", "backward", "checkpoint", "publish")
_COMMON: Final = (
    *("--device", "cpu", "--threads", "1", "--epochs", "1"),
    *("--batch-size", "128", "--checkpoint-steps", "3"),
)
ADDED: Final = "large"
"""The task of the command that adds one."""
COMMANDS: Final[Mapping[str, tuple[str, ...]]] = {
    "train": (
        *("pipelines/train.py", "--preset", "digits", "--image-size", "16", "--head", "linear", "--tasks", "loop"),
        *("--encoder.epochs", "1", "--encoder.batch-size", "128", "--accountant", "rdp", "--noise-seed", "7"),
        *_COMMON,
    ),
    "add": (
        *("pipelines/add_task.py", ADDED, "--epsilon", "8", "--omega", "0", "--accountant", "rdp"),
        *("--noise-seed", "9", *_COMMON),
    ),
}
"""Checkpoints after 3, 6 and all steps of each phase. The fixed seed of the noise makes runs comparable."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run and what befalls it."""

    who: str
    when: str
    strikes: tuple[dict[str, Any], ...]
    ends: tuple[str, ...] = ("done",)
    """How each start of the command ends: done, killed, or refused. All but the first are resumed."""
    command: str = "train"
    workers: int = 1
    """Of phase 1."""
    engine: str = "joined"
    """joined: a cluster that outlives the command; own: a cluster that the command starts; process: no Ray."""
    server: str = ""
    """Of MLflow: back, at once after it was killed; away, until the command has ended; empty: there is none."""
    elsewhere: bool = False
    """Whether the tenant of the task that is added is a process of its own, which is started again when it dies."""

    @property
    def name(self) -> str:
        """As a folder."""
        return f"{self.who}-{self.when}".replace(" ", "-")

    @property
    def reference(self) -> str:
        """The undisturbed run that it must be equal to."""
        return self.command if self.workers == 1 else f"{self.command} with {self.workers} workers"


def _strike(point: str, do: str, step: int | None = None, **where: Any) -> dict[str, Any]:
    return {"point": point, "do": do, **({} if step is None else {"step": step}), **where}


def _drivers(who: str, *, command: str) -> Iterator[Cell]:
    """The driver dies in each phase of the run, one after the other, and then at every point of its publications."""
    first = "encoder" if command == "train" else "modules"
    points = {
        "forward": (("training forward", 4), ("producer forward", 4)),
        "backward": (("training backward", 4), ("producer backward", 4)),
        "checkpoint": ((f"{first} checkpoint", 6), ("session checkpoint", 6)),
    }
    for when, places in points.items():
        strikes = tuple(_strike(point, "kill driver", step) for point, step in places)
        yield Cell(who=who, when=when, strikes=strikes, ends=("killed", "killed", "done"), command=command)
    parts = ["the encoder", "the tasks"] if command == "train" else ["the tasks"]
    moments = [moment for part in parts for moment in (f"before {part}", "after the upload", f"after {part}")]
    yield Cell(
        who=who,
        when="publish",
        strikes=tuple(_strike(moment, "kill driver") for moment in moments),
        ends=(*["killed"] * len(moments), "done"),
        command=command,
        engine="process",
    )


def _clusters() -> Iterator[Cell]:
    """Everything dies: in phase 2, in phase 1, in phase 2, and between the writes of the encoder's publication."""
    points = {
        "forward": ("producer forward", 4),
        "backward": ("training backward", 4),
        "checkpoint": ("session checkpoint", 6),
        "publish": ("after the upload", None),
    }
    for when, (point, step) in points.items():
        strikes = (_strike(point, "kill all", step),)
        yield Cell(who="cluster", when=when, strikes=strikes, ends=("killed", "done"), engine="own")


def _parties() -> Iterator[Cell]:
    for when, function, step in zip(PHASES, ("forward", "backward", "state", "weights"), (4, 4, 6, None), strict=True):
        yield Cell(who="producer", when=when, strikes=(_strike(f"producer {function}", "kill", step),))
    for task in ("loop", "parity"):
        for when, function, step in zip(PHASES, ("forward", "backward", "state", "head"), (4, 4, 6, None), strict=True):
            strike = _strike(f"consumer {function}", "kill", step, task=task)
            yield Cell(who=f"consumer {task}", when=when, strikes=(strike,))


def _workers() -> Iterator[Cell]:
    points = ("training forward", "training backward", "encoder checkpoint", "training result")
    for workers in (1, 2):
        for when, point, step in zip(PHASES, points, (4, 4, 6, None), strict=True):
            # Only the first of several writes files and has the result.
            rank = 1 if workers == 2 and when in {"forward", "backward"} else 0
            who = "train worker" if workers == 1 else "train worker of 2"
            strike = _strike(point, "kill", step, rank=rank)
            yield Cell(who=who, when=when, strikes=(strike,), workers=workers)


def _tracker() -> Iterator[Cell]:
    back = _strike("training result", "wait for server")
    strikes = {
        "forward": (_strike("training forward", "kill server", 4), back),
        "backward": (_strike("training backward", "kill server", 4), back),
        "checkpoint": (_strike("session checkpoint", "kill server", 6),),
        "publish": (_strike("after the upload", "kill server"),),
    }
    for when, what in strikes.items():
        comes_back = back in what
        yield Cell(
            who="tracker",
            when=when,
            strikes=what,
            ends=("done",) if comes_back else ("refused", "done"),
            server="back" if comes_back else "away",
            engine="process",
        )


def _disk() -> Iterator[Cell]:
    full = "disk full from then on"
    files = (_strike("encoder checkpoint", full, 6), _strike("session checkpoint", full, 6))
    uploads = (_strike("draft", "disk full"), _strike("upload", "disk full"))
    refused, who = ("refused", "done"), "disk full"
    yield Cell(who=who, when="forward", strikes=(_strike("feature cache", "disk full"),), ends=refused)
    yield Cell(who=who, when="backward", strikes=(_strike("charge", "ledger full", 5),), ends=refused)
    yield Cell(who=who, when="checkpoint", strikes=files, engine="process")
    yield Cell(who=who, when="publish", strikes=uploads, ends=("refused", *refused), engine="process")


def _elsewhere() -> Iterator[Cell]:
    """A tenant behind HTTP dies, or its producer does. Both must end as with a hosted tenant that lives."""
    points = zip(PHASES, ("forward", "backward", "state", "head"), (4, 4, 6, None), strict=True)
    tenant = {when: (_strike(f"consumer {function}", "kill", step),) for when, function, step in points}
    driver = {
        "forward": (_strike("producer forward", "kill driver", 4),),
        "backward": (_strike("producer backward", "kill driver", 4),),
        "checkpoint": (_strike("session checkpoint", "kill driver", 6),),
        "publish": tuple(
            _strike(moment, "kill driver") for moment in ("before the tasks", "after the upload", "after the tasks")
        ),
    }
    for who, strikes in (("remote tenant", tenant), ("remote tenant's driver", driver)):
        for when, what in strikes.items():
            ends = ("done",) if strikes is tenant else (*["killed"] * len(what), "done")
            yield Cell(who=who, when=when, strikes=what, ends=ends, command="add", engine="process", elsewhere=True)


def cells() -> list[Cell]:
    """The whole matrix, in the order of its rows."""
    return [
        *_drivers("driver", command="train"),
        *_parties(),
        *_workers(),
        *_clusters(),
        *_tracker(),
        *_disk(),
        *_drivers("add_task driver", command="add"),
        *_elsewhere(),
    ]
