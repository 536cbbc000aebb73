"""What bounds a feature, beside attackers who try: the bound holds, says when it is broken, and is printed."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from evaluations import evaluation, leakage

from orchestrator.evaluation.attacks.linear import LinearAttack
from orchestrator.evaluation.attacks.mlp import MlpAttack
from orchestrator.evaluation.bounded import BoundedFeature, bounded_feature, bounded_sheet
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.document import Figures, page_of, tables_of
from orchestrator.evaluation.leakage import TaskFeatures, evaluate_leakage
from orchestrator.evaluation.report import Bound
from orchestrator.evaluation.row_bounds import best_guess, least_task_bits, measured_rate, rate_row_bound
from orchestrator.evaluation.tables import leakage_markdown
from orchestrator.privacy.bounded.bounds import accuracy_bound
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.bounded.rate import RateBound
from tasks.spec import TaskSpec

SIZES = {"train": 600, "attacker": 600, "test": 1000}
CHANNEL = ChannelConfig(dimensions=2, noise=0.5)
SECRETS = 16


def constellation(secret: np.ndarray) -> np.ndarray:
    """(N, 2): a producer's module that gives all of its power to the secret, as points on a circle."""
    angle = 2 * np.pi * secret / SECRETS
    return math.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def spec(name: str, k: int) -> TaskSpec:
    return TaskSpec(name=name, target=name, classes=tuple(map(str, range(k))))


def attacked(*, noise: float, channel: ChannelConfig | None = CHANNEL, points: int = SECRETS):
    """Random labels, and a feature that tells one of them as well as it can, or which group of its values."""
    rng = np.random.default_rng(0)
    labels = {
        "secret": {s: rng.integers(0, SECRETS, n) for s, n in SIZES.items()},
        "pose": {s: rng.integers(0, 2, n) for s, n in SIZES.items()},
    }
    sent = {s: constellation(y // (SECRETS // points) * (SECRETS // points)) for s, y in labels["secret"].items()}
    z = {s: value + noise * rng.standard_normal(value.shape) for s, value in sent.items()}
    features = {s: value.astype(np.float32)[:, :, None, None] for s, value in z.items()}
    specs = {"secret": spec("secret", SECRETS), "pose": spec("pose", 2)}
    rate = None if channel is None else measured_rate(channel, sent, labels["secret"])
    given = {"pose": TaskFeatures(spec=specs["pose"], features=features, channel=channel, rate=rate)}
    budget = AttackBudget(attacks=(LinearAttack(), MlpAttack()), seeds=1)
    return evaluate_leakage(given, labels, specs, budget=budget, seed=0).row("pose", "secret")


def test_no_attacker_reads_more_than_the_bits_allow_even_if_the_feature_is_nothing_but_the_secret():
    row = attacked(noise=CHANNEL.noise)
    assert row.bound is not None and row.leak is not None
    assert row.bound.bits == pytest.approx(math.log2(5))
    assert row.bound.accuracy == pytest.approx(accuracy_bound(math.log2(5), [1 / SECRETS] * SECRETS).accuracy, abs=0.02)
    assert 2 / SECRETS < row.leak <= row.bound.accuracy < 1, (
        "far more than chance is read, and not more than is allowed"
    )
    assert not row.breaks_bound


def test_a_feature_that_lacks_its_noise_is_found_out():
    row = attacked(noise=0.0)
    assert row.leak == pytest.approx(1.0, abs=0.02)
    assert row.breaks_bound


def test_a_feature_without_a_channel_has_no_bound():
    row = attacked(noise=0.5, channel=None)
    assert row.bound is None and row.rate_bound is None and not row.breaks_bound
    assert row.to_json()["bound"] is None and row.to_json()["rate_bound"] is None


def test_the_rate_bounds_accuracy_below_capacity_where_a_feature_uses_less_than_it_might():
    """Two points carry about .9 bits through a channel of 2.3: the secret's 16 values are told apart two ways only."""
    row = attacked(noise=CHANNEL.noise, points=2)
    assert row.bound is not None and row.rate_bound is not None and row.leak is not None
    assert row.rate_bound.bits < 1.1 < row.bound.bits
    assert row.leak <= row.rate_bound.accuracy < row.bound.accuracy - 0.1
    assert row.leak > 1.5 / SECRETS
    assert "as the held-out ones were" in row.rate_bound.assumption
    assert not row.breaks_bound


def test_an_attacker_above_the_rate_bound_alone_is_found_out():
    row = attacked(noise=CHANNEL.noise)
    assert row.rate_bound is not None
    low = dataclasses.replace(row, rate_bound=dataclasses.replace(row.rate_bound, accuracy=0.1))
    assert low.breaks_bound


def test_coalitions_add_up_what_was_measured_of_each_and_a_feature_without_a_rate_has_no_such_bound():
    rate = RateBound(bits=0.9, low=0.8, high=1.0, n=100, assumption="like these")
    over = dataclasses.replace(rate, high=9.0)
    y = np.arange(1000) % SECRETS
    both = rate_row_bound([CHANNEL, CHANNEL], [rate, over], y, y, own=None)
    assert both is not None
    assert both.bits == pytest.approx(1.0 + math.log2(5)), "where capacity is less than the rate, it is capacity"
    assert both.accuracy == pytest.approx(accuracy_bound(both.bits, [1 / SECRETS] * SECRETS).accuracy, abs=1e-3)
    assert rate_row_bound([CHANNEL, CHANNEL], [rate, None], y, y, own=None) is None
    assert rate_row_bound([CHANNEL, None], [rate, None], y, y, own=None) is None


def test_what_a_task_is_proven_to_take_is_not_there_for_a_secret():
    """1.05 bits, one of which the task takes: of an independent secret of four values next to nothing can be read."""
    rate = RateBound(bits=1.0, low=1.0, high=1.05, n=1000, assumption="like these")
    pose, secret = np.arange(1000) % 2, np.arange(1000) // 2 % 4
    found = rate_row_bound([CHANNEL], [rate], pose, secret, own=1.0)
    assert found is not None and found.method == "given_task"
    assert found.accuracy < 0.45
    without = rate_row_bound([CHANNEL], [rate], pose, secret, own=0.5)
    assert without is not None and without.method != "given_task"
    assert without.accuracy > 0.6
    assert "function of the image" in found.assumption


def test_a_task_is_credited_with_the_lower_end_of_its_accuracy_only():
    y = np.arange(100) % 2
    assert least_task_bits(1.0, y) == pytest.approx(0.78, abs=0.02), "100 of 100 right may be 96.4 %"
    assert least_task_bits(0.55, y) == 0.0
    assert best_guess(y, y) == 1.0
    assert best_guess(y, np.arange(100) // 2 % 2) == 0.5


def test_the_rate_is_within_capacity_and_near_what_the_constellation_carries():
    """s takes 16 values: with little noise it carries log2(16) = 4 bits, below the capacity of 5.6 bits."""
    channel, rng = ChannelConfig(dimensions=2, noise=0.15), np.random.default_rng(1)
    secret = {s: rng.integers(0, SECRETS, n) for s, n in SIZES.items()}
    vectors = {s: constellation(y).astype(np.float32) for s, y in secret.items()}
    feature = bounded_feature("secret", channel, measured_rate(channel, vectors, secret), secret["test"], own=1.0)
    assert feature.rate.bits == pytest.approx(4.0, abs=0.15)
    assert feature.rate.bits < feature.channel.bits_per_image
    assert feature.bits == feature.rate.high
    assert 3.9 < feature.task_bits < 4.0, "its own head is always right, which takes nearly all of H(y) for sure"
    told = json.loads(json.dumps(feature.to_json()))
    assert told["bits"] == channel.bits_per_image
    assert "none of these was used to fit the prior" in told["rate"]["assumption"]


@pytest.fixture
def feature() -> BoundedFeature:
    rng = np.random.default_rng(2)
    labels = {s: rng.integers(0, 2, n) for s, n in SIZES.items()}
    vectors = {s: constellation(8 * y).astype(np.float32) for s, y in labels.items()}
    return bounded_feature("pose", CHANNEL, measured_rate(CHANNEL, vectors, labels), labels["test"], own=0.9)


def bounded_leakage(*, accuracy: float):
    """The pose feature's rows of `evaluations.leakage`, bounded: it leaks eyes at 97 %."""
    bound = Bound(bits=math.log2(5), accuracy=accuracy, method="fano", assumption="")
    rate = dataclasses.replace(bound, bits=2.0, accuracy=accuracy - 0.005)
    report = leakage()
    rows = tuple(
        dataclasses.replace(r, bound=bound, rate_bound=rate) if r.feature == "pose" else r for r in report.rows
    )
    return dataclasses.replace(report, rows=rows)


def finding(of):
    (found,) = [f for f in page_of(of, Figures()).findings if "carries at most" in f.text]
    return found


def test_the_report_sets_the_bound_beside_what_was_measured(feature):
    whole = evaluation(leakage=bounded_leakage(accuracy=0.98), bounded=(feature,))
    text = finding(whole).text
    assert text.startswith("The feature of pose carries at most 2.33 bits of its image, whatever the attacker; ")
    assert (
        "eyes 98.0 % (on images like these 97.5 %, measured 97.0 %); who 98.0 % (on images like these 97.5 %, " in text
    )
    assert finding(whole).mark == "good"
    assert [sheet.title for sheet in tables_of(whole)].count("What bounded features carry") == 1
    assert "What bounds the features" in {section.title for section in page_of(whole, Figures()).sections}


def test_an_attacker_above_the_bound_is_an_alarm_and_not_a_result(feature):
    found = finding(evaluation(leakage=bounded_leakage(accuracy=0.6), bounded=(feature,)))
    assert "An attacker reads eyes more often than these bits allow, which cannot be" in found.text
    assert found.mark == "bad"


def test_an_evaluation_without_bounded_features_does_not_speak_of_them():
    page = page_of(evaluation(), Figures())
    assert not any("carries at most" in f.text for f in page.findings)
    assert "| bound |" not in leakage_markdown(leakage()) and "bound: " not in leakage_markdown(leakage())


def test_the_table_has_a_column_for_the_bound_with_a_dash_where_there_is_none():
    lines = leakage_markdown(bounded_leakage(accuracy=0.98)).splitlines()
    header = next(line for line in lines if line.startswith("| feature"))
    names = [cell.strip() for cell in header.split("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith(("| pose", "| eyes"))][:4]
    assert [row[names.index("bound")] for row in cells] == ["98.0", "98.0", "-", "-"]
    assert [row[names.index("rate bound")] for row in cells] == ["97.5", "97.5", "-", "-"]
    assert "rate bound: the same for images like the test rows" in "\n".join(lines)
    assert "bound: no attacker is right more often" in "\n".join(lines)


def test_the_sheet_says_what_its_columns_mean(feature):
    sheet = bounded_sheet([feature])
    assert sheet.rows[0][:5] == ["pose", "1", "2", "0.5", "2.32"]
    assert len(sheet.rows[0]) == len(sheet.names)
    assert "capacity" in sheet.note and "95 %" in sheet.note
