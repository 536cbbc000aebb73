import math

import pytest

from orchestrator.evaluation.attacks.base import AttackResult
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.floors import Floor, clopper_pearson
from orchestrator.evaluation.report import CLAIM_ATTACKS, AttackSummary, Ceiling, LeakageReport, LeakageRow


def summary(attack, *corrects, total=10_000):
    results = tuple(
        AttackResult(attack=attack, seed=i, correct=c, total=total, accuracy=c / total) for i, c in enumerate(corrects)
    )
    return AttackSummary(attack=attack, results=results)


def by_everyone(*corrects):
    return [summary(attack, *corrects) for attack in CLAIM_ATTACKS]


def row(*attacks, chance=0.5, floor=0.4, target="b"):
    return LeakageRow(
        feature="a",
        target=target,
        n_test=10_000,
        swap=None,
        swap_perm=None,
        attacks=attacks,
        chance=chance,
        chance_balanced=0.5,
        target_bits=1.0,
        floor=Floor(floor, floor),
    )


def test_the_leak_is_the_largest_mean_over_the_attacks_and_not_the_luckiest_seed():
    steady, lucky = summary("steady", 6000, 6000, 6000), summary("lucky", 5000, 5000, 7000)
    found = row(steady, lucky)
    assert found.best is steady
    assert found.leak == pytest.approx(0.6)
    assert lucky.accuracy_max == 0.7


@pytest.mark.parametrize(("chance", "floor", "excess"), [(0.5, 0.4, 0.1), (0.5, 0.55, 0.05)])
def test_the_excess_is_over_the_larger_of_chance_and_floor(chance, floor, excess):
    assert row(summary("linear", 6000), chance=chance, floor=floor).excess == pytest.approx(excess)


def test_seeds_share_their_test_rows_so_they_do_not_narrow_the_interval():
    one, three = summary("x", 500, total=1000), summary("x", 500, 500, 500, total=1000)
    assert three.accuracy_interval == one.accuracy_interval == clopper_pearson(500, 1000)
    uneven = summary("x", 500, 501, total=1000).accuracy_interval
    assert uneven == (clopper_pearson(500, 1000)[0], clopper_pearson(501, 1000)[1])


def test_a_claim_needs_the_upper_bound_within_two_points():
    # 10,000 rows: the half-width is 0.98 points, so a mean of 50.9 % is within 52 % and one of 51.1 % is not.
    assert row(*by_everyone(5090, 5090, 5090)).chance_claim_allowed
    refused = row(*by_everyone(5110, 5110, 5110))
    assert not refused.chance_claim_allowed
    assert refused.claim_obstacle == "the leak may be as high as 52.1%; a claim needs at most 52.0%"


@pytest.mark.parametrize("missing", CLAIM_ATTACKS)
def test_a_claim_needs_every_kind_of_attacker_to_have_tried(missing):
    tried = [attack for attack in by_everyone(5000, 5000, 5000) if attack.attack != missing]
    assert row(*tried).claim_obstacle == f"not tried: {missing}"


def test_a_claim_needs_every_attack_to_fail_and_enough_rows_and_seeds():
    assert not row(summary("x", 5000, 5000, 5000), summary("y", 6000, 6000, 6000)).chance_claim_allowed
    assert not row(summary("x", 50, 50, 50, total=100)).chance_claim_allowed
    assert row(summary("x", 5000, 5000)).claim_obstacle == "2 seed(s) per attack; a claim needs 3"


def test_the_worst_row_is_the_one_with_the_largest_excess():
    low, high = row(summary("x", 5000)), row(summary("x", 9000), target="c")
    report = LeakageReport(
        rows=(low, high),
        own={"a": 0.9},
        private=frozenset(),
        targets=("a", "b", "c"),
        budget=AttackBudget.preset("quick"),
        seed=0,
    )
    assert report.worst is high
    assert report.features == ("a",)
    assert report.to_json()["rows"][1]["leak_attack"] == "x"


def test_the_best_attacker_is_found_for_every_measure():
    calm = AttackSummary(
        attack="calm", results=(AttackResult(attack="calm", seed=0, correct=6, total=10, accuracy=0.6, bits=0.3),)
    )
    found = row(summary("rough", 7000), calm)
    assert found.best.attack == "rough"
    assert (found.best_by("bits").attack, found.leak_by("bits")) == ("calm", 0.3)
    assert found.leak_by("auc") is None
    assert found.to_json()["leak_bits"] == 0.3


def test_the_balanced_excess_is_over_the_larger_of_the_balanced_floor_and_chance():
    balanced = AttackSummary(
        attack="x", results=(AttackResult(attack="x", seed=0, accuracy=0.9, total=10, balanced_accuracy=0.7),)
    )
    assert row(balanced, floor=0.4).excess_balanced == pytest.approx(0.2)
    assert row(balanced, floor=0.6).excess_balanced == pytest.approx(0.1)


def test_the_interval_over_seeds_is_students():
    low, high = summary("x", 5000, 6000, 7000).seed_interval("accuracy")
    half = 4.302653 * 0.1 / 3**0.5  # t(0.975) of two degrees of freedom
    assert (low, high) == (pytest.approx(0.6 - half), pytest.approx(0.6 + half))
    assert all(math.isnan(bound) for bound in summary("x", 5000).seed_interval("accuracy"))
    assert summary("x", 5000).to_json()["seed_intervals"]["accuracy"] == [None, None]


def test_a_ceiling_is_the_larger_of_features_and_images():
    universal = summary("linear", 6000), summary("cnn", 8000)
    assert Ceiling(target="b", attacks=universal, images=0.7).accuracy == 0.8
    assert Ceiling(target="b", attacks=universal, images=0.9).accuracy == 0.9
    written = Ceiling(target="b", attacks=universal).to_json()
    assert (written["universal"], written["universal_attack"], written["images"]) == (0.8, "cnn", None)


def test_a_measure_that_is_not_defined_has_no_interval():
    assert all(math.isnan(bound) for bound in summary("x", 5000, 5100, 5200).seed_interval("auc"))
