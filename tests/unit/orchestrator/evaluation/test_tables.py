import io

import pytest
from rich.console import Console

from orchestrator.evaluation.attacks.base import AttackResult
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.floors import Floor
from orchestrator.evaluation.report import AttackSummary, LeakageReport, LeakageRow
from orchestrator.evaluation.tables import attack_cell, leakage_markdown, leakage_table


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
        budget=AttackBudget.preset("quick", seeds=2),
        seed=0,
    )


def test_the_markdown_has_one_row_per_feature_and_target_with_the_numbers_in_percent(report):
    lines = leakage_markdown(report).splitlines()
    assert lines[0] == "| feature | target | own | swap | swap perm | linear | cnn | chance | floor | excess |"
    assert lines[2] == "| pose | eyes | 97.4 | 25.0 | 50.0 | 91.0 | 95.0 (1 crashed) | 30.2 | 40.0 | +55.0 |"
    assert lines[3] == "| pose | person (private) | 97.4 | - | - | crashed | crashed | 30.2 | 40.0 | crashed |"
    assert lines[4] == "| eyes | pose | - | 25.0 | 50.0 | 40.0 | 35.0 | 30.2 | 40.0 | +0.0 |"
    assert lines[5] == "| eyes | person (private) | - | 25.0 | 50.0 | 10.0 | 10.0 | 30.2 | 40.0 | -30.0 |"
    assert lines[6] == ""


def test_the_accuracy_of_a_network_trained_alone_stands_beside_the_own_one(report):
    lines = leakage_markdown(report, alone={"pose": 0.981}).splitlines()
    assert lines[0].startswith("| feature | target | own | alone | swap |")
    assert lines[2].startswith("| pose | eyes | 97.4 | 98.1 | 25.0 |")
    assert lines[4].startswith("| eyes | pose | - | - | 25.0 |")


def test_the_legend_names_the_rows_that_may_be_called_at_chance(report):
    assert "no row" in leakage_markdown(report)
    quiet = row("a", "b", summary("linear", 0.3, 0.3, 0.3))
    claim = LeakageReport(
        rows=(quiet,), own={}, private=frozenset(), targets=("b",), budget=AttackBudget.preset("full"), seed=0
    )
    assert "(95 % bound within 2 points): a on b." in leakage_markdown(claim)
    assert "never saw and its training rows, the mean of 3 seeds" in leakage_markdown(claim)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_terminal_table_shows_every_number_whole(report, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(leakage_table(report, alone={"pose": 0.981, "eyes": 0.5}))
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    for shown in ("97.4", "98.1", "91.0", "+55.0", "-30.0", "crashed", "(private)", "(1"):
        assert shown in printed
    assert "…" not in printed


def test_the_terminal_table_has_as_many_rows_as_the_report(report):
    assert leakage_table(report).row_count == 4


def test_a_crash_is_never_averaged_away():
    assert attack_cell(summary("x", None, None)) == "crashed"
    assert attack_cell(summary("x", 0.5, None, None)) == "50.0 (2 crashed)"
    assert attack_cell(summary("x", 0.5, 0.6)) == "55.0"
