"""One evaluation: all that was measured of one encoder and its tasks. Parts that were not measured are None."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.evaluation.attacks.hijack import HijackReport
from orchestrator.evaluation.bounded import BoundedFeature
from orchestrator.evaluation.comparison import FORMAT
from orchestrator.evaluation.membership import MembershipResult
from orchestrator.evaluation.reconstruction.report import ReconstructionReport
from orchestrator.evaluation.report import LeakageReport
from orchestrator.evaluation.subject import Subject


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What reports and figures are made of, and what ``evaluation.json`` holds."""

    subject: Subject
    budget: str
    """``quick`` or ``full``."""
    leakage: LeakageReport | None = None
    alone: Mapping[str, float] = field(default_factory=dict)
    """Test accuracy of each sold task's network trained alone on images without privacy, where it was asked for."""
    bounded: tuple[BoundedFeature, ...] = ()
    """Of every sold task whose feature is bounded."""
    reconstruction: ReconstructionReport | None = None
    membership: Mapping[str, tuple[MembershipResult, ...]] | None = None
    """By sold task."""
    hijack: tuple[HijackReport, ...] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time of each part."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary with every number. No picture is in it."""
        return {
            "format": FORMAT,
            "subject": self.subject.to_json(),
            "budget": self.budget,
            "leakage": None if self.leakage is None else self.leakage.to_json(),
            "alone": dict(self.alone),
            "bounded": [feature.to_json() for feature in self.bounded],
            "reconstruction": None if self.reconstruction is None else self.reconstruction.to_json(),
            "membership": None
            if self.membership is None
            else {task: [result.to_json() for result in results] for task, results in self.membership.items()},
            "hijack": None if self.hijack is None else [report.to_json() for report in self.hijack],
            "seconds": dict(self.seconds),
        }
