import io
from dataclasses import replace

import pytest
from rich.console import Console

from orchestrator.evaluation.attacks.base import AttackResult
from orchestrator.evaluation.attacks.cnn import CnnAttack
from orchestrator.evaluation.attacks.linear import LinearAttack
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.floors import Floor
from orchestrator.evaluation.report import CLAIM_ATTACKS, AttackSummary, Ceiling, LeakageReport, LeakageRow
from orchestrator.evaluation.tables import attack_cell, leakage_markdown, leakage_tables


def summary(attack, *accuracies):
    """One result per accuracy; None for a crash."""
    results = tuple(
        AttackResult(attack=attack, seed=i, crashed="MemoryError: no room")
        if accuracy is None
        else AttackResult(attack=attack, seed=i, correct=round(1000 * accuracy), total=1000, accuracy=accuracy)
        for i, accuracy in enumerate(accuracies)
    )
    return AttackSummary(attack=attack, results=results)


def row(feature, target, *attacks, swap=0.25, swap_perm=0.5):
    return LeakageRow(
        feature=feature,
        target=target,
        n_test=1000,
        swap=swap,
        swap_perm=swap_perm,
        attacks=attacks,
        chance=0.302,
        chance_balanced=0.5,
        target_bits=1.0,
        floor=Floor(0.4, 0.3),
    )


@pytest.fixture
def report():
    return LeakageReport(
        rows=(
            row("pose", "eyes", summary("linear", 0.9, 0.92), summary("cnn", 0.95, None)),
            row("pose", "person", summary("linear", None, None), summary("cnn", None, None), swap=None, swap_perm=None),
            row("eyes", "pose", summary("linear", 0.4, 0.3998), summary("cnn", 0.35, 0.35)),
            row("eyes", "person", summary("linear", 0.1, 0.1), summary("cnn", 0.1, 0.1)),
        ),
        own={"pose": 0.974, "eyes": None, "person": 0.99},
        private=frozenset({"person"}),
        targets=("pose", "eyes", "person"),
        budget=AttackBudget(attacks=(LinearAttack(), CnnAttack()), seeds=2),
        seed=0,
    )


def lines_of(report, title, **more):
    """The lines of one Markdown table."""
    lines = [*leakage_markdown(report, **more).splitlines(), ""]
    start = lines.index(f"**{title}**") + 2
    return lines[start : lines.index("", start)]


def test_the_first_table_has_one_row_per_feature_and_target_with_the_numbers_in_percent(report):
    lines = lines_of(report, "What each feature tells")
    assert lines[0] == "| feature | target | own | swap | swap perm | best | by | bits | chance | floor | excess |"
    assert lines[2] == "| pose | eyes | 97.4 | 25.0 | 50.0 | 95.0 | cnn (1 crashed) | - | 30.2 | 40.0 | +55.0 |"
    assert (
        lines[3] == "| pose | person (private) | 97.4 | - | - | crashed | - (4 crashed) | - | 30.2 | 40.0 | crashed |"
    )
    assert lines[4] == "| eyes | pose | - | 25.0 | 50.0 | 40.0 | linear | - | 30.2 | 40.0 | +0.0 |"
    assert lines[5] == "| eyes | person (private) | - | 25.0 | 50.0 | 10.0 | linear | - | 30.2 | 40.0 | -30.0 |"
    assert len(lines) == 6


def test_the_second_table_has_a_column_for_every_attacker(report):
    lines = lines_of(report, "Every attacker")
    assert lines[0] == "| feature | target | linear | cnn |"
    assert lines[2] == "| pose | eyes | 91.0 | 95.0 (1 crashed) |"
    assert lines[3] == "| pose | person (private) | crashed | crashed |"


def test_the_accuracy_of_a_network_trained_alone_stands_beside_the_own_one(report):
    lines = lines_of(report, "What each feature tells", alone={"pose": 0.981})
    assert lines[0].startswith("| feature | target | own | alone | swap |")
    assert lines[2].startswith("| pose | eyes | 97.4 | 98.1 | 25.0 |")
    assert lines[4].startswith("| eyes | pose | - | - | 25.0 |")


def test_collusion_stands_beside_what_each_feature_tells_alone(report):
    together = row("pose + eyes", "person", summary("linear", 0.6), swap=None, swap_perm=None)
    budget = replace(report.budget, collusion=(LinearAttack(),))
    lines = lines_of(replace(report, collusion=(together,), budget=budget), "Two tenants together")
    assert lines[0] == "| coalition | target | apart | linear | chance | floor | excess |"
    assert lines[2] == "| pose + eyes | person (private) | 10.0 | 60.0 | 30.2 | 40.0 | +20.0 |"


def test_a_control_has_a_column_beside_the_floor(report):
    rows = tuple(replace(row, control=(summary("linear", 0.41), summary("cnn", 0.43))) for row in report.rows[:1])
    controlled = replace(report, rows=(*rows, *report.rows[1:]))
    first = lines_of(controlled, "What each feature tells")
    assert first[0].endswith("| chance | floor | control | excess |")
    assert [line.split(" | ")[-2] for line in first[2:4]] == ["43.0", "-"]
    assert "dealt anew among images with the same own label" in leakage_markdown(controlled)
    assert "dealt anew" not in leakage_markdown(report)


def test_ceilings_show_how_weak_an_attacker_is(report):
    ceilings = (Ceiling(target="eyes", attacks=(summary("linear", 0.8), summary("cnn", 0.99)), images=0.97),)
    higher = replace(report, ceilings=ceilings)
    lines = lines_of(higher, "If nothing were held back")
    assert lines[0] == "| target | chance | images | by | universal |"
    assert lines[2] == "| eyes | 30.2 | 97.0 | cnn | 99.0 |"
    first = lines_of(higher, "What each feature tells")
    assert first[0].endswith("| chance | floor | ceiling | excess |")
    assert first[2].endswith("| 30.2 | 40.0 | 99.0 | +55.0 |")
    assert first[4].endswith("| 30.2 | 40.0 | - | +0.0 |")


def test_what_was_not_run_is_a_dash_and_its_reason_is_below(report):
    skipped = AttackSummary(attack="adapter", results=(AttackResult(attack="adapter", seed=0, skipped="no head"),))
    assert attack_cell(skipped) == "-"
    quiet = replace(report, rows=(row("a", "b", summary("x", 0.5), skipped),))
    assert "Not run: adapter: no head." in leakage_markdown(quiet)


def test_the_legend_names_the_rows_that_may_be_called_at_chance(report):
    assert "no row" in leakage_markdown(report)
    quiet = row("a", "b", *(summary(attack, 0.3, 0.3, 0.3) for attack in CLAIM_ATTACKS))
    claim = LeakageReport(
        rows=(quiet,), own={}, private=frozenset(), targets=("b",), budget=AttackBudget.preset("full"), seed=0
    )
    assert "(95 % bound within 2 points): a on b." in leakage_markdown(claim)
    assert "never saw and its training rows, the mean of 3 seeds" in leakage_markdown(claim)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_terminal_tables_show_every_number_whole(report, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    ceilings = (Ceiling(target="eyes", attacks=(summary("linear", 0.8),), images=0.876),)
    full = replace(report, ceilings=ceilings, budget=AttackBudget.preset("full"))
    rows = tuple(replace(r, attacks=r.attacks + (summary("x", 0.123),) * 7) for r in report.rows)
    for table in leakage_tables(replace(full, rows=rows), alone={"pose": 0.981, "eyes": 0.5}):
        console.print(table)
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    for shown in (
        "97.4",
        "98.1",
        "91.0",
        "+55.0",
        "-27.7",
        "crashed",
        "(private)",
        "(1",
        "12.3",
        "87.6",
        "decensoring",
    ):
        assert shown in printed
    assert "…" not in printed


def test_the_terminal_tables_have_as_many_rows_as_the_report(report):
    assert [table.row_count for table in leakage_tables(report)] == [4, 4]


def test_a_crash_is_never_averaged_away():
    assert attack_cell(summary("x", None, None)) == "crashed"
    assert attack_cell(summary("x", 0.5, None, None)) == "50.0 (2 crashed)"
    assert attack_cell(summary("x", 0.5, 0.6)) == "55.0"
