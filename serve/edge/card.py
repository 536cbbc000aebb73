"""What a head's file says of itself. Written where heads are exported, read at the edge: one definition for both.

Nothing here needs more than the standard library, or a Python newer than 3.9.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.edge.errors import HeadError

FORMAT = "metamorphosis-head"
FORMAT_VERSION = "1"
INPUT = "feature"
"""Name of the graph's input: float32, (B, C, H, W)."""
LOGITS, MAP = "logits", "map"
"""Of its output: float32, (B, n_classes) or (B, *answer_shape)."""


@dataclass(frozen=True)
class HeadCard:
    """Which feature a head takes, and what its answers mean."""

    task: str
    version: str
    """Of the published task whose features it was trained on."""
    feature_shape: tuple[int, ...]
    """(C, H, W)."""
    classes: tuple[str, ...] = ()
    """In the order of the logits; none of a task that answers with a map."""
    answer_shape: tuple[int, ...] | None = None
    """(C, H, W) of the map; None of a task that answers with a class."""

    @property
    def output(self) -> str:
        """Name of the graph's output."""
        return LOGITS if self.answer_shape is None else MAP

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one example's output."""
        return (len(self.classes),) if self.answer_shape is None else self.answer_shape

    def to_metadata(self) -> dict[str, str]:
        """Text to text, as an ONNX file's properties hold it; `from_metadata` reads it back."""
        found = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "version": self.version,
            "feature_shape": json.dumps(list(self.feature_shape)),
            "classes": json.dumps(list(self.classes)),
        }
        return found if self.answer_shape is None else {**found, "answer_shape": json.dumps(list(self.answer_shape))}

    @classmethod
    def from_metadata(cls, data: Mapping[str, str]) -> HeadCard:
        """Raises `HeadError` for the properties of any other file."""
        if data.get("format") != FORMAT:
            raise HeadError("it is no head that pipelines/export_head.py or serve.edge.train wrote")
        if data.get("format_version") != FORMAT_VERSION:
            raise HeadError(
                f"it has format version {data.get('format_version')}, this client reads {FORMAT_VERSION}: "
                "export the head anew, or update the client"
            )
        try:
            classes, answer = json.loads(data["classes"]), json.loads(data.get("answer_shape", "null"))
            card = cls(
                task=data["task"],
                version=data["version"],
                feature_shape=_shape(json.loads(data["feature_shape"])),
                classes=tuple(str(name) for name in classes),
                answer_shape=None if answer is None else _shape(answer),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise HeadError(f"its properties are damaged: {error}") from error
        if not card.feature_shape or bool(card.classes) == bool(card.answer_shape):
            raise HeadError("its properties are damaged: it names no shape, or neither or both of classes and a map")
        return card


def _shape(sides: Any) -> tuple[int, ...]:
    return tuple(_size(side) for side in sides)


def _size(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no size")
    return value
