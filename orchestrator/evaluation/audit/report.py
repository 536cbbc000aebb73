"""An audit: for every mode a lower bound on epsilon from many trainings, beside the epsilon that is claimed."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from orchestrator.errors import ConfigError
from orchestrator.evaluation.audit.bound import Bound, Scores, epsilon_lower_bound, largest_bound
from orchestrator.evaluation.audit.canary import N_TRAIN
from orchestrator.evaluation.audit.trial import NO_CLIP, NO_NOISE, OPEN_HEAD, Case, Trials, run_trials
from orchestrator.privacy.dp import DpMode
from orchestrator.privacy.guarantee import PAPER
from orchestrator.sampling import derive_seed

_TOGETHER: Final = 25
"""Trainings in one piece of work: less than a second."""

Runner = Callable[[Callable[[Trials], Scores], Sequence[Trials]], Iterator[Scores]]
"""`map`, or one that spreads over processes and keeps the order."""
Progress = Callable[[int, int, str], None]
"""Called with (trainings done, trainings in all, what is being trained)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditRow:
    """One case: what is claimed for it, and what was shown."""

    mode: str
    fault: str | None
    """What was broken, in words; None where the claim has to hold."""
    because: str
    """With a fault: why the claim does not hold."""
    claim: float
    """The epsilon that a run would print, nominal where it guarantees nothing."""
    delta: float
    sample_rate: float
    """Probability with which each example, the canary too, enters a batch."""
    steps: int
    """Of each training, all stages together."""
    bound: Bound

    @property
    def exceeds(self) -> bool:
        """Whether more was lost than is claimed."""
        return self.bound.epsilon > self.claim

    @property
    def as_expected(self) -> bool:
        """Whether the claim holds where it has to, and the audit sees where it does not."""
        return self.exceeds == (self.fault is not None)

    @property
    def verdict(self) -> str:
        """In words."""
        if self.fault is None:
            return "EXCEEDS THE CLAIM" if self.exceeds else "under the claim"
        return f"exceeds the claim: {self.because}" if self.exceeds else f"NOT SEEN, though {self.because}"

    @property
    def surprise(self) -> str:
        """What is wrong, where something is."""
        if self.fault is None:
            return f"{self.mode} claims epsilon {self.claim:.2f}, and at least {self.bound.epsilon:.2f} was lost"
        return f"{self.fault} in {self.mode} was not seen: {self.bound.epsilon:.2f} is not above {self.claim:.2f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """All rows, and how far they can be trusted."""

    rows: tuple[AuditRow, ...]
    runs: int
    """Trainings with the canary, for each row; as many without."""
    confidence: float
    """Of each row's bound."""
    largest: float
    """The largest bound that so many runs could have shown."""

    @property
    def surprises(self) -> tuple[AuditRow, ...]:
        """Claims that do not hold, and faults that were not seen."""
        return tuple(row for row in self.rows if not row.as_expected)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        derived = [{"exceeds": row.exceeds, "as_expected": row.as_expected} for row in self.rows]
        rows = [{**asdict(row), **more} for row, more in zip(self.rows, derived, strict=True)]
        return {**asdict(self), "rows": rows, "n_train": N_TRAIN}


def audit(
    modes: Sequence[DpMode],
    *,
    epsilon: float,
    runs: int,
    confidence: float,
    seed: int | None = None,
    run: Runner = map,
    progress: Progress | None = None,
) -> AuditReport:
    """Audit the modes, and whether the audit sees: two faults are planted in the first mode that guarantees something.

    Every training has fresh secrets from the operating system, or from ``seed``. Raises `ConfigError` where so few runs
    cannot show more than is claimed, and the faults would pass unseen.
    """
    cases = _cases(modes, epsilon=epsilon)
    delta = cases[0].plans[0].delta
    largest = largest_bound(runs, delta=delta, confidence=confidence)
    if largest <= epsilon:
        raise ConfigError(
            f"{runs} runs can show an epsilon of at most {largest:.2f} with confidence {confidence:g}, which is not "
            f"above the claim of {epsilon:g}: a fault could not be seen; raise --runs, or lower --epsilon"
        )
    work = [trials for case in cases for trials in _trials(case, runs, seed)]
    scores: dict[tuple[int, bool], list[Scores]] = {}
    done = 0
    for trials, found in zip(work, run(run_trials, work), strict=True):
        scores.setdefault((id(trials.case), trials.with_canary), []).append(found)
        done += len(found)
        if progress is not None:
            progress(done, 2 * runs * len(cases), trials.case.name)
    rows = []
    for case in cases:
        with_canary, without = (np.concatenate(scores[id(case), present]) for present in (True, False))
        rows.append(_row(case, epsilon_lower_bound(with_canary, without, delta=delta, confidence=confidence)))
    return AuditReport(rows=tuple(rows), runs=runs, confidence=confidence, largest=largest)


def _cases(modes: Sequence[DpMode], *, epsilon: float) -> list[Case]:
    sound = [mode for mode in modes if mode != PAPER]
    cases = [Case.make(mode, epsilon=epsilon) for mode in sound]
    cases += [Case.make(mode, epsilon=epsilon, fault=fault) for mode in sound[:1] for fault in (NO_NOISE, NO_CLIP)]
    return cases + [Case.make(mode, epsilon=epsilon, fault=OPEN_HEAD) for mode in modes if mode == PAPER]


def _trials(case: Case, runs: int, seed: int | None) -> Iterable[Trials]:
    fault = case.fault.name if case.fault else ""
    for first in range(0, runs, _TOGETHER):
        for with_canary in (True, False):
            drawn = tuple(
                secrets.randbits(63) if seed is None else derive_seed(seed, case.dp.dp_mode, fault, int(with_canary), i)
                for i in range(first, min(runs, first + _TOGETHER))
            )
            yield Trials(case=case, with_canary=with_canary, secrets=drawn)


def _row(case: Case, bound: Bound) -> AuditRow:
    guarantee = case.guarantee()
    claim = guarantee.epsilon if guarantee.epsilon is not None else guarantee.nominal_epsilon
    assert claim is not None and guarantee.delta is not None
    return AuditRow(
        mode=case.dp.dp_mode,
        fault=case.fault.name if case.fault else None,
        because=case.fault.because if case.fault else "",
        claim=claim,
        delta=guarantee.delta,
        sample_rate=case.plans[0].sample_rate,
        steps=guarantee.steps,
        bound=bound,
    )
