"""The audit as a command: flags, table, file and exit status."""

from __future__ import annotations

import dataclasses
import json

import pytest

from orchestrator.evaluation.audit import report, trial
from pipelines import audit
from pipelines.command import execute

SMALL = ("--epsilon", "1", "--runs", "40", "--processes", "1", "--seed", "0")


def run(*flags: str) -> int:
    try:
        return execute("orchestrator.settings.audit:AuditSettings", audit.run, flags, prog="audit.py")
    except SystemExit as end:
        return int(end.code or 0)


def test_a_small_audit_prints_its_table_writes_its_numbers_and_ends_well(capsys, tmp_path):
    out = tmp_path / "audit.json"
    assert run(*SMALL, "--modes", "frozen_head,encoder_only_paper", "--out", str(out)) == 0
    said = capsys.readouterr().out
    for words in (
        "under the claim",
        "exceeds the claim: the noise is off",
        "exceeds the claim: the clip is removed",
        "exceeds the claim: the head learns without noise",
        "So many can show at most",
        "Every claim holds, and every planted fault was seen.",
    ):
        assert words in said
    assert [row["as_expected"] for row in json.loads(out.read_text())["rows"]] == [True] * 4


def test_several_processes_find_what_one_finds(tmp_path):
    found = []
    for processes in ("1", "2"):
        out = tmp_path / f"{processes}.json"
        flags = ("--epsilon", "1", "--runs", "40", "--seed", "0", "--modes", "encoder_only_paper", "--out", str(out))
        assert run(*flags, "--processes", processes) == 0
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1]


def test_a_training_that_lost_its_noise_ends_with_status_1_and_is_named(capsys, monkeypatch):
    """The plan that the audit is given for the sound row has no noise, though it claims as with it."""
    sound = trial.Case.score

    def score(case, *, with_canary, secret):
        plans = tuple(trial.NO_NOISE.plant(plan) for plan in case.plans)
        return sound(dataclasses.replace(case, plans=plans), with_canary=with_canary, secret=secret)

    monkeypatch.setattr(trial.Case, "score", score)
    assert run(*SMALL, "--modes", "whole") == 1
    said = capsys.readouterr()
    assert "EXCEEDS THE CLAIM" in said.out
    assert "error: whole claims epsilon 1.00, and at least" in said.err


def test_a_fault_that_is_not_seen_ends_with_status_1_and_is_named(capsys, monkeypatch):
    monkeypatch.setattr(report, "NO_NOISE", dataclasses.replace(trial.NO_NOISE, plant=lambda plan: plan))
    assert run(*SMALL, "--modes", "whole") == 1
    said = capsys.readouterr()
    assert "NOT SEEN, though the noise is off" in said.out
    assert "error: noise off in whole was not seen" in said.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--modes", "whole,hole"), "no mode named 'hole'"),
        (("--modes", ""), "one at least"),
        (("--modes", "whole,whole"), "each mode once"),
        (("--runs", "1"), "runs must be at least 2"),
        (("--confidence", "1"), "confidence must be"),
        (("--epsilon", "0"), "epsilon must be"),
        (("--processes", "0"), "processes must be"),
        (("--seed", "-1"), "seed must be"),
        (("--runs", "10", "--epsilon", "1", "--modes", "whole"), "raise --runs, or lower --epsilon"),
    ],
)
def test_what_cannot_be_done_ends_with_status_2_and_one_line(capsys, flags, says):
    assert run(*flags) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


def test_an_unknown_flag_ends_with_status_2(capsys):
    assert run("--mode", "whole") == 2
    assert "--modes" in capsys.readouterr().err


def test_the_help_explains_every_flag(capsys):
    assert run("--help") == 0
    said = capsys.readouterr().out
    for flag in ("--modes", "--epsilon", "--runs", "--confidence", "--seed", "--processes", "--out"):
        assert flag in said
