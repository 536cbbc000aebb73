"""Evaluations of several encoders side by side: what is read back of each one's ``evaluation.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import DataError
from orchestrator.privacy.accounting import rounded_up
from orchestrator.privacy.bounded.channel import ChannelConfig

FILE = "evaluation.json"
FORMAT = 2
"""Of that file; another one is refused."""

Scope = Literal["none", "encoder", "whole"]
"""Which weights differential privacy covers: no weights, at least the encoder's, or all."""

_SCOPES: Mapping[str, Scope] = {
    "none": "none",
    "encoder_only_paper": "encoder",
    "surrogate_then_freeze": "encoder",
    "surrogate_dp_modules": "encoder",
    "whole": "whole",
    "two_budget": "whole",
    "public_head": "whole",
    "frozen_head": "whole",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetPoint:
    """What one task's feature tells about one label that is not its own. Fractions."""

    leak: float | None
    """Accuracy of the best attacker; None where none came through."""
    baseline: float
    """What needs no feature."""
    bound: float | None
    """What no attacker exceeds, by capacity; None where the feature is not bounded."""
    rate_bound: float | None
    """The same by the measured rate."""
    shares: tuple[float, ...]
    """Of the labels among the test rows; empty where they were not recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPoint:
    """One task of one evaluation. Fractions."""

    own: float | None
    """Accuracy of its own head; None where that is not here."""
    excess: float | None
    """The worst over the targets, of the best attacker; None where none came through."""
    swap: float | None
    """The best that another task's head does on its feature, above what needs no feature."""
    omega: float | None
    """None where it was not recorded."""
    bits: float | None = None
    """That its feature carries of an image at most; None where nothing bounds it."""
    targets: Mapping[str, TargetPoint] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One evaluation of one encoder."""

    name: str
    """What figures call it."""
    fingerprint: str
    """Of the data's content: only evaluations on the same are comparable."""
    split_index: int
    epsilon: float | None
    """Guaranteed, or nominal in a mode that guarantees nothing; None: without DP. Two decimals, rounded up as in
    statements: trainings of one budget end a hair apart."""
    mode: str
    tasks: Mapping[str, TaskPoint]
    reconstruction: Mapping[str, float] | None
    """PSNR and SSIM of the best attack on the encoder's own output and of the mean image; None if not measured."""

    @property
    def scope(self) -> Scope:
        """What its noise covers."""
        return _SCOPES[self.mode]

    @property
    def omega(self) -> float | None:
        """Of its tasks; None unless all have the same."""
        omegas = {task.omega for task in self.tasks.values()}
        return omegas.pop() if len(omegas) == 1 else None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Point:
        """From what `Evaluation.to_json` gives."""
        subject, leakage = data["subject"], data["leakage"] or {"own": {}, "rows": []}
        guarantee, encoder = subject["encoder"]["guarantee"], subject["encoder"]
        sold = [task for task, record in subject["tasks"].items() if not record["private"]]
        epsilon = guarantee["epsilon"] if guarantee["epsilon"] is not None else guarantee["nominal_epsilon"]
        return cls(
            name=f"{subject['catalog']} {encoder['version']}",
            fingerprint=encoder["data_fingerprint"],
            split_index=encoder["split_index"],
            epsilon=None if epsilon is None else float(rounded_up(epsilon)),
            mode=guarantee["mode"],
            tasks={task: _task(leakage, task, subject["tasks"][task]) for task in sold},
            reconstruction=_reconstruction(data["reconstruction"]),
        )


def read_points(folders: Sequence[Path], *, fingerprint: str) -> list[Point]:
    """Of earlier evaluations. Raises `DataError` for a folder without one, another format, or other data."""
    points = []
    for folder in folders:
        path = folder / FILE if folder.is_dir() else folder
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"there is no evaluation at {folder}: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise DataError(f"{path} is no evaluation of this program's format {FORMAT}: evaluate that encoder again")
        point = Point.of(data)
        if point.fingerprint != fingerprint:
            raise DataError(
                f"{path} is of other data (content {point.fingerprint[:12]}, here {fingerprint[:12]}): its numbers "
                "cannot be compared with these"
            )
        points.append(point)
    return points


def _task(leakage: Mapping[str, Any], task: str, record: Mapping[str, Any]) -> TaskPoint:
    rows = [row for row in leakage["rows"] if row["feature"] == task]
    swaps = [row["swap"] - max(row["chance"], row["floor"]) for row in rows if row["swap"] is not None]
    dissimilarity = record.get("dissimilarity")
    channel = record["module_config"].get("channel")
    return TaskPoint(
        own=leakage["own"].get(task),
        excess=max((row["excess"] for row in rows if row["excess"] is not None), default=None),
        swap=max(swaps, default=None),
        omega=None if dissimilarity is None else dissimilarity["omega"],
        bits=None if channel is None else ChannelConfig.from_json(channel).bits_per_image,
        targets={row["target"]: _target(row) for row in rows},
    )


def _target(row: Mapping[str, Any]) -> TargetPoint:
    """Evaluations from before a kind of bound was measured lack it."""
    bounds = {name: None if row.get(name) is None else row[name]["accuracy"] for name in ("bound", "rate_bound")}
    return TargetPoint(
        leak=row["leak"],
        baseline=max(row["chance"], row["floor"]),
        shares=tuple(row.get("target_shares", ())),
        **bounds,
    )


def _reconstruction(report: Mapping[str, Any] | None) -> Mapping[str, float] | None:
    row = next((row for row in (report or {"rows": []})["rows"] if row["feature"] == "encoder"), None)
    best = next((attack for attack in row["attacks"] if attack["attack"] == row["best"]), None) if row else None
    if row is None or best is None:
        return None
    return {
        "psnr": best["psnr"],
        "ssim": best["ssim"],
        "mean_image_psnr": row["mean_image"]["psnr"],
        "mean_image_ssim": row["mean_image"]["ssim"],
    }
