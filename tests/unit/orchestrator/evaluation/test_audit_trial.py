"""Audits of the code that trains: claims hold, and what breaks them is seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import torch

from orchestrator.encoder_training import EncoderTraining
from orchestrator.errors import ConfigError
from orchestrator.evaluation.audit import report, trial
from orchestrator.evaluation.audit.canary import N_TRAIN, SPEC, TASK, worst_case
from orchestrator.evaluation.audit.report import AuditReport, AuditRow, audit
from orchestrator.evaluation.audit.trial import NO_CLIP, NO_NOISE, OPEN_HEAD, Case, Fault
from orchestrator.privacy.dp import DpMode
from orchestrator.privacy.guarantee import PAPER

MODES = get_args(DpMode)
SOUND = tuple(mode for mode in MODES if mode != PAPER)


def scores(case: Case, *, with_canary: bool, runs: int = 6) -> np.ndarray:
    return np.array([case.score(with_canary=with_canary, secret=1000 * with_canary + i) for i in range(runs)])


def told_apart(case: Case) -> bool:
    """Whether every run with the canary scores above every run without."""
    return scores(case, with_canary=True).min() > scores(case, with_canary=False).max()


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_the_module() -> Iterator[None]:
    """Before `small`, which the fixture of the folder would come after."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small() -> AuditReport:
    """Not many more runs than it takes to see a fault at epsilon 1."""
    return audit(("whole", PAPER), epsilon=1.0, runs=40, confidence=0.95, seed=0)


def test_a_valid_mode_stays_under_the_claim_and_all_three_faults_are_seen(small):
    assert [(row.mode, row.fault) for row in small.rows] == [
        ("whole", None),
        ("whole", "noise off"),
        ("whole", "clip removed"),
        (PAPER, "counter-example"),
    ]
    assert [row.exceeds for row in small.rows] == [False, True, True, True]
    assert small.surprises == ()


def test_a_fault_shows_as_much_as_so_many_runs_can(small):
    assert [row.bound.epsilon for row in small.rows[1:]] == [pytest.approx(small.largest)] * 3


def test_the_claim_is_what_a_run_prints(small):
    """At most 0.01 below what was asked for; and of the paper's mode, the nominal epsilon."""
    assert all(0.99 <= row.claim <= 1.0 for row in small.rows)
    assert Case.make(PAPER, epsilon=1.0).guarantee().epsilon is None


@pytest.mark.parametrize("mode", SOUND)
def test_the_canary_is_heard_in_every_mode_but_not_told_apart(mode):
    """With noise of once the clip its mean score is about 1.6 standard deviations off, and the two overlap."""
    case = Case.make(mode, epsilon=1.0)
    case = dataclasses.replace(case, plans=tuple(dataclasses.replace(p, noise_multiplier=1.0) for p in case.plans))
    with_canary, without = (scores(case, with_canary=present, runs=20) for present in (True, False))
    assert with_canary.mean() - without.mean() > 0.7 * without.std()
    assert with_canary.min() < without.max()


@pytest.mark.parametrize("mode", SOUND)
@pytest.mark.parametrize("fault", [NO_NOISE, NO_CLIP], ids=lambda fault: fault.name)
def test_without_noise_or_clip_every_run_gives_the_canary_away(mode, fault):
    assert told_apart(Case.make(mode, epsilon=1.0, fault=fault))


def test_an_open_head_gives_the_canary_away_and_a_covered_or_a_fixed_one_does_not():
    """The same examples, from the same weights, in the modes that close the gap."""
    flipped = Case.make(PAPER, epsilon=1.0, fault=OPEN_HEAD)
    assert told_apart(flipped)
    for mode in ("whole", "frozen_head"):
        closed = dataclasses.replace(flipped.plans[0], mode=mode)
        assert not told_apart(dataclasses.replace(flipped, plans=(closed,)))


def test_only_what_a_mode_releases_is_looked_at():
    """The surrogate of surrogate_then_freeze is thrown away: no direction of the attacker's is in it."""
    for mode in MODES:
        case = Case.make(mode, epsilon=1.0)
        released: set[str] = set()
        for part, result in case._train(case.plans, with_canary=True):
            released |= set(trial._weights(result, of=part))
        assert set(case.planted.directions) <= released
    assert set(Case.make("surrogate_then_freeze", epsilon=1.0).planted.directions) == {"encoder"}


@pytest.mark.parametrize("mode", ["whole", "two_budget"])
def test_the_canary_is_at_the_clipping_norm_and_stays_there(mode):
    """Without noise each step that draws it moves each direction; its loss never saturates."""
    case = Case.make(mode, epsilon=1.0, fault=NO_NOISE)
    planted, plan = case.planted, NO_NOISE.plant(case.plans[0])
    training = EncoderTraining(
        config=planted.config,
        plan=plan,
        network=planted.networks,
        image_size=0,
        specs={TASK: SPEC},
        inputs=planted.inputs(with_canary=True),
        labels=planted.labels,
        seed=0,
    )
    moved = 0.0
    for _ in range(training.total_steps):
        training.train_step()
        encoder = training.encoder.weight.detach()
        now = float((encoder * planted.directions["encoder"]).sum())
        assert now >= moved
        moved = now
        logits = training.logits(planted.canary[None])[TASK][0]
        assert torch.softmax(logits, 0)[1] < 0.95


def test_neighbours_have_as_many_examples_and_the_place_holder_moves_nothing():
    planted = worst_case(("encoder",))
    here, there = planted.inputs(with_canary=True), planted.inputs(with_canary=False)
    assert here.size("train") == there.size("train") == N_TRAIN
    assert torch.equal(here.x[:-1], there.x[:-1])
    case = Case.make("whole", epsilon=1.0, fault=NO_NOISE)
    assert scores(case, with_canary=False).tolist() == [0.0] * 6


def test_planting_a_fault_leaves_the_claim_and_one_of_the_two_protections():
    plan = Case.make("two_budget", epsilon=1.0).plans[0]
    silent, unclipped = NO_NOISE.plant(plan), NO_CLIP.plant(plan)
    assert (silent.epsilon, unclipped.epsilon) == (plan.epsilon, plan.epsilon)
    assert silent.max_grad_norm == plan.max_grad_norm
    before, after = plan.parts(), unclipped.parts()
    assert before is not None
    assert after is not None
    for name, part in before.items():
        std = part.noise_multiplier * part.max_grad_norm
        assert after[name].noise_multiplier * after[name].max_grad_norm == pytest.approx(std)
        assert after[name].max_grad_norm > 1e9


def test_a_seed_makes_an_audit_repeatable_and_without_one_it_is_not():
    def noises(seed: int | None) -> list[list[tuple[int, ...]]]:
        case = Case.make("frozen_head", epsilon=1.0)
        return [[trials.secrets for trials in report._trials(case, 30, seed)] for _ in range(2)]

    once, again = noises(1)
    assert once == again
    assert len({s for secrets in once for s in secrets}) == 60
    once, again = noises(None)
    assert not {s for secrets in once for s in secrets} & {s for secrets in again for s in secrets}
    case = Case.make("frozen_head", epsilon=1.0)
    assert case.score(with_canary=False, secret=1) == case.score(with_canary=False, secret=1)
    assert case.score(with_canary=False, secret=1) != case.score(with_canary=False, secret=2)


def test_too_few_runs_to_see_a_fault_are_refused():
    with pytest.raises(ConfigError, match=r"10 runs can show an epsilon of at most 0\.\d\d.*--runs"):
        audit(("whole",), epsilon=1.0, runs=10, confidence=0.95)


def row(*, fault: Fault | None, bound: float) -> AuditRow:
    from orchestrator.evaluation.audit.bound import Bound

    shown = Bound(epsilon=bound, true_positives=1, false_positives=0, runs=2)
    name, because = (fault.name, fault.because) if fault else (None, "")
    return AuditRow(
        mode="whole", fault=name, because=because, claim=4.0, delta=1e-2, sample_rate=0.5, steps=16, bound=shown
    )


def test_a_broken_claim_and_a_missed_fault_are_surprises_that_say_which():
    rows = (row(fault=None, bound=4.5), row(fault=None, bound=4.0), row(fault=NO_NOISE, bound=3.0))
    whole = AuditReport(rows=rows, runs=4, confidence=0.95, largest=9.0)
    assert [r.surprise for r in whole.surprises] == [
        "whole claims epsilon 4.00, and at least 4.50 was lost",
        "noise off in whole was not seen: 3.00 is not above 4.00",
    ]
    assert [r.verdict for r in rows] == ["EXCEEDS THE CLAIM", "under the claim", "NOT SEEN, though the noise is off"]
    assert row(fault=NO_NOISE, bound=5.0).verdict == "exceeds the claim: the noise is off"


def test_the_numbers_are_json_and_complete(small):
    import json

    read = json.loads(json.dumps(small.to_json()))
    assert [r["bound"]["epsilon"] for r in read["rows"]] == [r.bound.epsilon for r in small.rows]
    assert {"runs", "confidence", "largest", "rows", "n_train"} == set(read)
    assert all(math.isfinite(r["claim"]) for r in read["rows"])
