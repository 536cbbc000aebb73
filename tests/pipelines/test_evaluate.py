"""The evaluation as a command: what it writes, what it draws, and what it refuses."""

from __future__ import annotations

import base64
import functools
import json
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from orchestrator.catalog import Catalog
from orchestrator.evaluation.attacks.hijack import measure_hijack
from orchestrator.evaluation.reconstruction.budget import RECONSTRUCTION_BUDGETS, ReconstructionBudget
from orchestrator.evaluation.reconstruction.inversion import OptimisationInversion
from orchestrator.guard import GradientGuard
from pipelines import evaluate, train
from pipelines.command import execute

QUICK = [
    *("--image-size", "16", "--split-index", "5", "--head", "linear", "--device", "cpu", "--threads", "1"),
    *("--epochs", "2", "--encoder.epochs", "1", "--batch-size", "32", "--encoder.batch-size", "32"),
    *("--engine", "process", "--accountant", "rdp", "--private", "who", "--tasks", "pose,glasses"),
]


def run_train(*flags: str) -> int:
    return execute(
        "orchestrator.settings.train:TrainSettings", train.run, [*QUICK, *flags], prog="train.py", presets=True
    )


def run_evaluate(*flags: str) -> int:
    flags = ("--engine", "process", "--threads", "1", *flags)
    return execute("orchestrator.settings.evaluate:EvaluateSettings", evaluate.run, list(flags), prog="evaluate.py")


def evaluated(out: Path) -> dict:
    return json.loads((out / "evaluation.json").read_text())


def test_a_quick_evaluation_writes_report_tables_figures_and_numbers_and_logs_them(
    home, write_parquet, tmp_path, capsys
):
    out = tmp_path / "out"
    assert run_train("--data", write_parquet(), "--epsilon", "8") == 0
    assert run_evaluate("--alone", "1", "--ceiling", "1", "--control", "--out", str(out)) == 0
    told = capsys.readouterr().out
    for word in ("swap", "linear", "cnn", "chance", "floor", "excess", "control", "private", "nearest image", "AUC"):
        assert word in told
    assert f"Report   {out / 'report.html'}" in told
    numbers = evaluated(out)
    pairs = {(row["feature"], row["target"]) for row in numbers["leakage"]["rows"]}
    assert pairs == {("pose", "glasses"), ("pose", "who"), ("glasses", "pose"), ("glasses", "who")}
    assert all(0 <= row["luck"] <= 1 for row in numbers["leakage"]["rows"])
    ceilings = numbers["leakage"]["ceilings"]
    assert [ceiling["target"] for ceiling in ceilings] == ["pose", "glasses", "who"]
    assert all(0 <= ceiling["images"] <= 1 and ceiling["universal"] is not None for ceiling in ceilings)
    assert [row["feature"] for row in numbers["reconstruction"]["rows"]] == ["encoder", "pose", "glasses"]
    assert set(numbers["membership"]) == {"pose", "glasses"} and numbers["hijack"] is None
    assert numbers["subject"]["ledger"] is not None
    assert numbers["subject"]["tasks"]["pose"]["dissimilarity"]["omega"] == 0.001

    page = (out / "report.html").read_text()
    assert page.index("-differential privacy for the weights of encoder") < page.index("<table")
    for row in numbers["leakage"]["rows"]:
        assert f"{100 * row['leak']:.1f}" in page
    assert (out / "figures" / "leakage.png").read_bytes().startswith(b"\x89PNG")
    for name in ("leakage", "projection"):
        drawn = (out / "figures" / f"{name}.svg").read_bytes()
        assert base64.b64encode(drawn).decode() in page, "the page's own"

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("metamorphosis-faces")
    run = client.search_runs([experiment.experiment_id], "tags.command = 'evaluate'")[0]
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "evaluation.json", "tables.md", "figures"} <= files
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/report.html") == page


def test_pictures_that_may_show_people_are_neither_drawn_nor_kept_unless_asked_for(home, write_parquet, tmp_path):
    assert run_train("--data", write_parquet(), "--epsilon", "8") == 0
    part = ("--parts", "reconstruction")
    assert run_evaluate(*part, "--out", str(tmp_path / "without")) == 0
    assert not (tmp_path / "without" / "pictures.npz").exists()
    assert not (tmp_path / "without" / "figures" / "reconstruction.png").exists()
    assert run_evaluate(*part, "--pictures", "--out", str(tmp_path / "with")) == 0
    assert (tmp_path / "with" / "pictures.npz").exists()
    assert (tmp_path / "with" / "figures" / "reconstruction.png").exists()


def test_an_evaluation_beside_others_has_curves_and_other_data_is_refused_before_any_attack(
    home, write_parquet, tmp_path, capsys
):
    data = write_parquet()
    one, other = tmp_path / "one", tmp_path / "other"
    leakage = ("--parts", "leakage", "--attacks", "linear")
    assert run_train("--data", data, "--epsilon", "8") == 0
    assert run_evaluate(*leakage, "--out", str(one)) == 0
    assert run_train("--data", data, "--omega", "0.1") == 0
    assert run_evaluate(*leakage, "--beside", str(one), "--out", str(other)) == 0
    drawn = {path.name for path in (other / "figures").iterdir()}
    assert {"epsilon.png", "omega.png"} <= drawn
    assert "Beside other encoders" in (other / "report.html").read_text()
    assert [attack["name"] for attack in evaluated(other)["leakage"]["budget"]["attacks"]] == ["linear"]

    changed = evaluated(one)
    changed["subject"]["encoder"]["data_fingerprint"] = "00" * 32
    (one / "evaluation.json").write_text(json.dumps(changed))
    capsys.readouterr()
    assert run_evaluate(*leakage, "--beside", str(one)) == 2
    told = capsys.readouterr()
    assert "cannot be compared" in told.err and "attacking" not in told.out


def test_hijacking_is_tried_with_the_guard_off_and_on(home, write_parquet, tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.runs.evaluate.measure_hijack", functools.partial(measure_hijack, steps=6))
    assert run_train("--data", write_parquet(), "--epsilon", "8") == 0
    assert run_evaluate("--budget", "full", "--parts", "hijack", "--out", str(tmp_path / "out")) == 0
    reports = evaluated(tmp_path / "out")["hijack"]
    assert [report["encoder"] for report in reports] == ["frozen", "live"]
    assert [[run["guard"] for run in report["runs"]] for report in reports] == [[False, True]] * 2


def test_a_task_in_quarantine_is_not_published_and_the_others_are_evaluated(
    home, write_parquet, tmp_path, monkeypatch, capsys
):
    real = GradientGuard.accepts

    def accepts(self, message, *, contract, step, labels):
        if contract.task == "glasses" and step >= 2:
            self.quarantine("glasses", "planted")
            return False
        return real(self, message, contract=contract, step=step, labels=labels)

    monkeypatch.setattr(GradientGuard, "accepts", accepts)
    assert run_train("--data", write_parquet(), "--epsilon", "8") == 0
    assert "glasses is in quarantine and is not published: planted" in capsys.readouterr().out
    assert set(Catalog(f"sqlite:///{home}/mlflow.db", "faces").tasks("1")) == {"who", "pose"}
    assert run_evaluate("--parts", "leakage", "--attacks", "linear", "--out", str(tmp_path / "out")) == 0
    assert {row["feature"] for row in evaluated(tmp_path / "out")["leakage"]["rows"]} == {"pose"}


def test_who_inverts_the_network_is_given_it(home, write_parquet, tmp_path, monkeypatch):
    hurried = ReconstructionBudget(attacks=(OptimisationInversion(iterations=2),), judge=None)
    monkeypatch.setitem(RECONSTRUCTION_BUDGETS, "full", hurried)
    assert run_train("--data", write_parquet(), "--epsilon", "8") == 0
    chosen = ("--budget", "full", "--seeds", "1", "--parts", "reconstruction")
    assert run_evaluate(*chosen, "--out", str(tmp_path / "out")) == 0
    rows = evaluated(tmp_path / "out")["reconstruction"]["rows"]
    found = {row["feature"]: attack for row in rows for attack in row["attacks"]}
    assert found.keys() == {"encoder", "pose", "glasses"}
    for attack in found.values():
        assert [result["crashed"] for result in attack["results"]] == [None]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts", "leakage,leakage"], "named twice"),
        (["--parts", "hijack", "--alone", "2"], "belong to leakage"),
        (["--parts", "membership", "--control"], "belong to leakage"),
        (["--parts", "leakage", "--decoders", "decoder"], "belong to reconstruction"),
        (["--parts", "reconstruction", "--decoders", "oracle"], "known: decoder, lookup"),
        (["--ceiling", "-1"], "numbers of epochs"),
        (["--attacks", "oracle"], "known: cnn, few_50, knn, linear, mlp"),
        (["--beside", "nowhere"], "there is no evaluation at nowhere"),
        (["--targets", "age"], "age"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_what_can(home, write_parquet, capsys, flags, message):
    assert run_train("--data", write_parquet(), "--phase", "encoder", "--epsilon", "8") == 0
    capsys.readouterr()
    assert run_evaluate(*flags) == 2
    assert message in capsys.readouterr().err
