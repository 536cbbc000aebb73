"""What a head's file says of itself. Written where heads are exported, read at the edge: one definition for both.

Nothing here needs more than the standard library, or a Python newer than 3.9.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.edge.errors import HeadError

FORMAT = "metamorphosis-head"
FORMAT_VERSION = "1"
INPUT = "feature"
"""Name of the graph's input: float32, (B, C, H, W)."""
OUTPUT = "logits"
"""Of its output: float32, (B, n_classes)."""


@dataclass(frozen=True)
class HeadCard:
    """Which feature a head takes, and what its answers mean."""

    task: str
    version: str
    """Of the published task whose features it was trained on."""
    feature_shape: tuple[int, ...]
    """(C, H, W)."""
    classes: tuple[str, ...]
    """In the order of the logits."""

    @property
    def n_values(self) -> int:
        """Numbers in one feature."""
        return math.prod(self.feature_shape)

    def to_metadata(self) -> dict[str, str]:
        """Text to text, as an ONNX file's properties hold it; `from_metadata` reads it back."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "version": self.version,
            "feature_shape": json.dumps(list(self.feature_shape)),
            "classes": json.dumps(list(self.classes)),
        }

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
            shape, classes = json.loads(data["feature_shape"]), json.loads(data["classes"])
            card = cls(
                task=data["task"],
                version=data["version"],
                feature_shape=tuple(_size(side) for side in shape),
                classes=tuple(str(name) for name in classes),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise HeadError(f"its properties are damaged: {error}") from error
        if not card.feature_shape or not card.classes:
            raise HeadError("its properties are damaged: it names no shape or no classes")
        return card


def _size(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no size")
    return value
