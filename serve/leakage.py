"""What an evaluation measured of one served task, in the few numbers that its tenant is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError
from orchestrator.evaluation.comparison import FILE, FORMAT


def newest_evaluation(storage: Path, *, catalog: str, encoder_version: str) -> Path | None:
    """The newest ``evaluation.json`` of that encoder below the storage folder; None if there is none."""
    found = sorted(storage.glob(f"evaluations/*/{FILE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        subject = _read(path)["subject"]
        if subject["catalog"] == catalog and subject["encoder"]["version"] == encoder_version:
            return path
    return None


def measured(path: Path, task: str) -> dict[str, Any] | None:
    """The worst over all targets, without their names: those are other tenants' tasks. None if it was not attacked.

    ``excess`` is the accuracy of the best attacker above what needs no feature, ``bits`` the most that one read.
    """
    evaluation = _read(path)
    rows = [row for row in (evaluation["leakage"] or {"rows": []})["rows"] if row["feature"] == task]
    if not rows:
        return None
    return {
        "budget": evaluation["budget"],
        "evaluated": evaluation["subject"]["created"],
        "targets": len(rows),
        "excess": _largest(rows, "excess"),
        "bits": _largest(rows, "leak_bits"),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class BestReconstruction:
    """Of the attackers that tried to get images back from one feature."""

    attack: str
    ssim: float
    budget: str


def reconstructed(path: Path, feature: str) -> BestReconstruction | None:
    """The best attacker of that feature, a task's or ``encoder``; None if nobody tried, or all crashed."""
    evaluation = _read(path)
    for row in (evaluation.get("reconstruction") or {"rows": []})["rows"]:
        scores = {attack["attack"]: attack["ssim"] for attack in row["attacks"]}
        if row["feature"] == feature and row["best"] is not None:
            return BestReconstruction(
                attack=row["best"], ssim=float(scores[row["best"]]), budget=str(evaluation["budget"])
            )
    return None


def _largest(rows: list[Mapping[str, Any]], key: str) -> float | None:
    return max((float(row[key]) for row in rows if row.get(key) is not None), default=None)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}")
        _ = found["subject"]["catalog"], found["subject"]["encoder"]["version"], found["leakage"], found["budget"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no evaluation that this program reads ({error}): evaluate again") from error
    return found
