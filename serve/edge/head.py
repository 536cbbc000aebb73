"""A tenant's head at the edge: ONNX, run by onnxruntime. Axes: B examples, C, H, W of the feature."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.edge.card import INPUT, HeadCard
from serve.edge.errors import HeadError


@dataclass(frozen=True)
class Answer:
    """What a head says of one feature."""

    label: str
    probability: float
    """Of the label, by softmax. What a network believes; nobody has calibrated it."""
    probabilities: tuple[float, ...]
    """Of every class, in the order of the head's `HeadCard.classes`."""


class Head:
    """Loaded once, used from one thread at a time."""

    def __init__(self, session: Any, card: HeadCard) -> None:
        self._session, self.card = session, card

    @classmethod
    def load(cls, path: str | Path, *, threads: int | None = None) -> Head:
        """Read an exported head. ``threads`` of onnxruntime; None leaves it the choice.

        Raises `HeadError` for a file that is missing, damaged, or no exported head.
        """
        import onnxruntime

        path = Path(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            body = path.read_bytes()
        except OSError as error:
            raise HeadError(f"cannot read the head {path}: {error.strerror or error}") from error
        try:
            session = onnxruntime.InferenceSession(body, options, providers=onnxruntime.get_available_providers())
        except Exception as error:  # onnxruntime has an exception type for every cause, and no common one
            raise HeadError(f"{path} is no ONNX file that onnxruntime {onnxruntime.__version__} can run") from error
        try:
            card = HeadCard.from_metadata(session.get_modelmeta().custom_metadata_map)
        except HeadError as error:
            raise HeadError(f"cannot use the head {path}: {error}") from error
        ends = [[end.name for end in side] for side in (session.get_inputs(), session.get_outputs())]
        if ends != [[INPUT], [card.output]]:
            raise HeadError(
                f"cannot use the head {path}: it has other inputs and outputs than {INPUT} and {card.output}"
            )
        return cls(session, card)

    def logits(self, features_BCHW: NDArray[Any]) -> NDArray[np.float32]:
        """(B, C, H, W) to (B, n_classes). Raises `HeadError` for a feature of another shape."""
        if self.card.answer_shape is not None:
            raise HeadError(f"the head of task {self.card.task!r} answers with a map, and has no classes: see `maps`")
        return self._run(features_BCHW)

    def maps(self, features_BCHW: NDArray[Any]) -> NDArray[np.float32]:
        """(B, C, H, W) to maps (B, *answer_shape), as the network gives them: labels stand for 0 to 1, and it may pass.

        Raises `HeadError` for a feature of another shape.
        """
        if self.card.answer_shape is None:
            raise HeadError(f"the head of task {self.card.task!r} answers with a class, and with no map: see `answers`")
        return self._run(features_BCHW)

    def _run(self, features_BCHW: NDArray[Any]) -> NDArray[np.float32]:
        if features_BCHW.shape[1:] != self.card.feature_shape:
            raise HeadError(
                f"the head of task {self.card.task!r} takes features of shape {self.card.feature_shape}, "
                f"got {features_BCHW.shape[1:]}"
            )
        feed = {INPUT: np.ascontiguousarray(features_BCHW, dtype=np.float32)}
        found: NDArray[np.float32] = self._session.run([self.card.output], feed)[0]
        return found

    def answers(self, features_BCHW: NDArray[Any]) -> list[Answer]:
        """One for each feature."""
        if len(features_BCHW) == 0:
            return []
        logits = self.logits(features_BCHW).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = powers / powers.sum(axis=1, keepdims=True)
        best = shares.argmax(axis=1)
        return [
            Answer(
                label=self.card.classes[k],
                probability=float(row[k]),
                probabilities=tuple(float(share) for share in row),
            )
            for k, row in zip(best, shares)
        ]
