"""All three branches of Algorithm 2, from flags to what is published."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from orchestrator.catalog import Catalog
from orchestrator.privacy.guarantee import Guarantee
from pipelines import add_task, evaluate, train
from pipelines.command import execute

QUICK = [
    *("--image-size", "16", "--split-index", "5", "--head", "linear", "--device", "cpu", "--threads", "1"),
    *("--epochs", "2", "--encoder.epochs", "1", "--batch-size", "32", "--encoder.batch-size", "32"),
    *("--engine", "process", "--accountant", "rdp"),
]
SOLD = ["--private", "who", "--tasks", "pose,glasses"]


def run_train(*flags: str) -> int:
    return execute("TrainSettings", train.run, [*QUICK, *flags], prog="train.py", presets=True)


def catalog(home: Path) -> Catalog:
    return Catalog(f"sqlite:///{home}/mlflow.db", "faces")


@pytest.mark.parametrize(
    ("flags", "tasks", "covers"),
    [
        (["--epsilon", "8"], {"who", "pose", "glasses"}, {"encoder"}),
        (
            ["--epsilon", "8", "--dp-mode", "whole"],
            {"who", "pose", "glasses"},
            {"encoder", "the private attribute's module", "its classifier"},
        ),
        (["--epsilon", "8", "--dp-mode", "encoder_only_paper"], {"who", "pose", "glasses"}, set()),
        (["--algorithm", "task"], {"who", "pose", "glasses"}, set()),
        (["--algorithm", "input", "--epsilon", "8", "--omega", "0"], {"who", "pose", "glasses"}, {"encoder"}),
        (
            ["--algorithm", "input", "--epsilon", "8", "--omega", "0", "--dp-mode", "whole"],
            {"who", "pose", "glasses"},
            {"encoder", "metamorphosis modules", "heads"},
        ),
        (
            ["--algorithm", "input", "--epsilon", "8", "--omega", "0", "--dp-mode", "encoder_only_paper"],
            {"who", "pose", "glasses"},
            set(),
        ),
        (["--phase", "encoder", "--epsilon", "8"], set(), {"encoder"}),
    ],
)
def test_every_branch_publishes_what_it_trained_with_what_is_true_of_it(home, write_parquet, flags, tasks, covers):
    assert run_train("--data", write_parquet(), *SOLD, *flags) == 0
    published = catalog(home)
    records = published.tasks("1")
    assert set(records) == tasks
    assert {t for t, r in records.items() if r.private} == tasks & {"who"}
    guarantee = Guarantee.from_json(dict(published.encoder("1")[0].guarantee))
    assert set(guarantee.covers) == covers
    assert (guarantee.epsilon is not None) == bool(covers)
    assert (guarantee.nominal_epsilon is not None) == ("encoder_only_paper" in flags)
    for record in records.values():
        assert Guarantee.from_json(dict(record.guarantee)).covers == guarantee.covers


def test_phase_two_can_be_run_later_on_the_published_encoder(home, write_parquet):
    data = ["--data", write_parquet()]
    assert run_train(*data, "--private", "who", "--phase", "encoder", "--epsilon", "8") == 0
    before = catalog(home).published_hashes("1")
    assert run_train(*data, *SOLD, "--phase", "tasks") == 0
    assert set(catalog(home).tasks("1")) == {"who", "pose", "glasses"}
    after = catalog(home).published_hashes("1")
    assert {name: after[name] for name in before} == before


def test_the_private_attribute_cannot_be_sold_later(home, write_parquet, capsys):
    data = ["--data", write_parquet()]
    assert run_train(*data, "--private", "who", "--phase", "encoder", "--epsilon", "8") == 0
    assert run_train(*data, "--tasks", "who,pose", "--phase", "tasks") == 2
    assert "private attribute of encoder 1" in capsys.readouterr().err
    assert run_add("who") == 2
    assert catalog(home).tasks("1") == {}


def test_an_interrupted_run_is_resumed_without_training_the_encoder_again(home, write_parquet, monkeypatch):
    data = ["--data", write_parquet(), *SOLD, "--epsilon", "8"]
    from orchestrator.session import Session

    real = Session.run_epoch

    def interrupted(self):
        report = real(self)
        raise KeyboardInterrupt
        return report

    monkeypatch.setattr(Session, "run_epoch", interrupted)
    assert run_train(*data) == 130
    assert catalog(home).tasks("1") == {}
    monkeypatch.setattr(Session, "run_epoch", real)
    assert run_train(*data, "--resume") == 0
    assert catalog(home).encoder_versions() == ["1"]
    assert set(catalog(home).tasks("1")) == {"who", "pose", "glasses"}


def test_a_run_is_in_mlflow_with_everything_that_is_needed_to_judge_it(home, write_parquet):
    assert run_train("--data", write_parquet(), *SOLD, "--epsilon", "8") == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db", registry_uri=f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("metamorphosis-faces")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["dp.epsilon"] == "8.0"
    assert run.data.params["network.split_index"] == "5"
    assert len(client.get_metric_history(run.info.run_id, "pose/loss")) == 2
    assert run.data.metrics["epsilon"] <= 8.0
    assert "pose/test_accuracy" in run.data.metrics
    assert "epsilon" in run.data.tags["guarantee"]
    files = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"guarantee.txt", "guarantee.json", "training.png"} <= files
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/guarantee.txt")
    assert "differential privacy" in text
    names = {model.name for model in client.search_registered_models()}
    assert {"faces.encoder", "faces.module.pose", "faces.head.pose", "faces.module.who"} <= names


def test_a_task_that_is_overtaken_is_trained_apart_from_the_newcomer_before_it_is_published(
    home, write_parquet, monkeypatch, capsys
):
    """Between this session's start and its publication somebody publishes `glasses`."""
    data = write_parquet()
    assert run_train("--data", data, "--private", "who", "--phase", "encoder", "--epsilon", "8") == 0
    real = Catalog.publish_tasks
    overtaken = threading.Event()

    def overtake(self, version, entries, **rest):
        if [entry.spec.name for entry in entries] == ["pose"] and not overtaken.is_set():
            overtaken.set()
            assert run_add("glasses") == 0
        return real(self, version, entries, **rest)

    monkeypatch.setattr(Catalog, "publish_tasks", overtake)
    assert run_add("pose") == 0
    assert overtaken.is_set()
    assert "keeping pose apart from glasses, published meanwhile" in capsys.readouterr().out
    assert set(catalog(home).tasks("1")) == {"glasses", "pose"}


def run_add(task: str) -> int:
    flags = [task, "--engine", "process", "--threads", "1", "--epochs", "2", "--conflict-epochs", "1"]
    return execute("AddTaskSettings", add_task.run, flags, prog="add_task.py")


def test_the_evaluation_writes_table_figure_and_numbers(home, write_parquet, tmp_path, capsys):
    assert run_train("--data", write_parquet(), *SOLD, "--epsilon", "8") == 0
    flags = ["--engine", "process", "--alone", "1", "--out", str(tmp_path / "out"), "--threads", "1"]
    assert execute("EvaluateSettings", evaluate.run, flags, prog="evaluate.py") == 0
    out = capsys.readouterr().out
    for word in ("swap", "linear", "cnn", "chance", "floor", "excess", "private"):
        assert word in out
    numbers = json.loads((tmp_path / "out" / "leakage.json").read_text())
    assert {(row["feature"], row["target"]) for row in numbers["rows"]} == {
        ("pose", "glasses"),
        ("pose", "who"),
        ("glasses", "pose"),
        ("glasses", "who"),
    }
    assert (tmp_path / "out" / "leakage.png").read_bytes().startswith(b"\x89PNG")
