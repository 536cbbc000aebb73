"""All three branches of Algorithm 2, from flags to what is published."""

from __future__ import annotations

import io
import math
import threading
from pathlib import Path

import mlflow
import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient
from PIL import Image

from orchestrator.catalog import Catalog
from orchestrator.network import NetworkConfig
from orchestrator.privacy.guarantee import Guarantee
from orchestrator.privacy.ledger import Account, Ledger
from pipelines import add_task, train
from pipelines.command import execute

QUICK = [
    *("--image-size", "16", "--split-index", "5", "--head", "linear", "--device", "cpu", "--threads", "1"),
    *("--epochs", "2", "--encoder.epochs", "1", "--batch-size", "32", "--encoder.batch-size", "32"),
    *("--engine", "process", "--accountant", "rdp"),
]
SOLD = ["--private", "who", "--tasks", "pose,glasses"]


def run_train(*flags: str) -> int:
    return execute(
        "orchestrator.settings.train:TrainSettings", train.run, [*QUICK, *flags], prog="train.py", presets=True
    )


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
        (
            ["--epsilon", "8", "--dp-mode", "surrogate_dp_modules"],
            {"who", "pose", "glasses"},
            {"encoder"},
        ),
        (
            ["--epsilon", "8", "--dp-mode", "two_budget"],
            {"who", "pose", "glasses"},
            {"encoder", "the private attribute's module", "its classifier"},
        ),
        (
            ["--epsilon", "8", "--dp-mode", "frozen_head"],
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
    modules = {"metamorphosis modules"} if "surrogate_dp_modules" in flags else set()
    for record in records.values():
        assert set(Guarantee.from_json(dict(record.guarantee)).covers) == covers | modules


def turned(image: bytes) -> bytes:
    """The same picture upside down: another one."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(buffer, "PNG")
    return buffer.getvalue()


def ledger(home: Path) -> Account:
    with Ledger(home / "ledger.db") as opened:
        return opened.accounts()[0]


def test_modules_under_dp_share_the_budget_with_the_encoder_and_added_ones_come_on_top(home, write_parquet, capsys):
    data = ["--data", write_parquet(), "--dp-mode", "surrogate_dp_modules", "--epsilon", "8"]
    assert run_train(*data, "--private", "who", "--tasks", "pose") == 0
    encoder = Guarantee.from_json(dict(catalog(home).encoder("1")[0].guarantee))
    pose = Guarantee.from_json(dict(catalog(home).tasks("1")["pose"].guarantee))
    assert encoder.epsilon < pose.epsilon <= 8.0
    assert pose.epsilon > 7.9
    assert {e.part for e in ledger(home).entries} == {"encoder", "modules"}
    assert all(e.charged == e.mechanism.steps and e.released for e in ledger(home).entries)
    notes = [what for _, _, what in ledger(home).outside]
    assert "head of who, head of pose: trained without noise" in notes
    before = catalog(home).published_hashes("1")

    assert run_add("glasses", "--epsilon", "4", "--accountant", "rdp") == 0
    added = Guarantee.from_json(dict(catalog(home).tasks("1")["glasses"].guarantee))
    assert added.covers == ("encoder", "the module of glasses")
    assert added.epsilon > pose.epsilon, "it was kept apart from modules that cost something themselves"
    spent = ledger(home).spent(added.delta)
    assert added.epsilon == pytest.approx(spent), "all that was ever trained on these images is in this statement"
    assert {name: catalog(home).published_hashes("1")[name] for name in before} == before
    assert f"({math.ceil(added.epsilon * 100) / 100:.2f}," in capsys.readouterr().out


def test_a_module_under_dp_may_not_learn_from_what_has_no_guarantee(home, write_parquet, capsys):
    assert run_train("--data", write_parquet(), "--private", "who", "--tasks", "pose", "--epsilon", "8") == 0
    assert run_add("glasses", "--epsilon", "4") == 2
    assert "the module of 'who' was trained without noise" in capsys.readouterr().err
    assert run_add("glasses", "--epsilon", "4", "--omega", "0") == 0
    assert set(catalog(home).tasks("1")) == {"who", "pose", "glasses"}


def test_a_module_under_dp_on_an_encoder_without_a_guarantee_is_refused(home, write_parquet, capsys):
    assert run_train("--data", write_parquet(), "--tasks", "pose", "--algorithm", "task") == 0
    assert run_add("glasses", "--epsilon", "4") == 2
    assert "encoder 1 has no guarantee" in capsys.readouterr().err


def test_a_public_head_takes_public_images_and_refuses_private_ones(home, write_parquet, capsys):
    data = ["--data", write_parquet(), *SOLD, "--epsilon", "8", "--dp-mode", "public_head"]
    assert run_train(*data) == 2
    assert "--public-data go together" in capsys.readouterr().err

    def other(columns):
        columns["image"] = [turned(image) for image in columns["image"]]

    def mixed(columns):
        same = columns["image"][0]
        other(columns)
        columns["image"][7] = same

    def renamed(columns):
        other(columns)
        columns["who"] = [f"x{name}" for name in columns["who"]]

    assert run_train(*data, "--public-data", write_parquet(mixed, "mixed.parquet")) == 2
    assert "1 image(s) of parquet:" in capsys.readouterr().err
    assert run_train(*data, "--public-data", write_parquet(renamed, "renamed.parquet")) == 2
    assert "'who' has the classes xperson0" in capsys.readouterr().err
    assert not (home / "ledger.db").exists(), "what is refused for its public data has reserved nothing"
    assert run_train(*data, "--public-data", write_parquet(other, "public.parquet")) == 0
    guarantee = Guarantee.from_json(dict(catalog(home).encoder("1")[0].guarantee))
    assert "its classifier" in guarantee.covers
    assert "The public images are not protected" in guarantee.statement()


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


def test_a_frozen_head_may_be_given_as_a_file(home, write_parquet, tmp_path, capsys):
    data = ["--data", write_parquet(), *SOLD, "--epsilon", "8", "--dp-mode", "frozen_head"]
    head = NetworkConfig(split_index=5, head="linear").build_heads({"who": 4}, 16, seed=7)["who"]
    safetensors.torch.save_file(head.state_dict(), tmp_path / "head.safetensors")
    assert run_train(*data, "--head-weights", str(tmp_path / "head.safetensors")) == 0
    _, _, published = catalog(home).load_task("1", "who")
    assert all(torch.equal(published[name], value) for name, value in head.state_dict().items())
    (tmp_path / "head.safetensors").write_bytes(b"no head")
    assert run_train(*data, "--head-weights", str(tmp_path / "head.safetensors")) == 1
    assert "is truncated" in capsys.readouterr().err


def run_add(task: str, *more: str) -> int:
    flags = [task, "--engine", "process", "--threads", "1", "--epochs", "2", "--conflict-epochs", "1", *more]
    return execute("orchestrator.settings.add_task:AddTaskSettings", add_task.run, flags, prog="add_task.py")
