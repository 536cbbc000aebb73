"""Bounded features from flags to what is published, added to, evaluated and refused."""

from __future__ import annotations

import functools
import json
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from orchestrator import release
from orchestrator.catalog import Catalog
from orchestrator.evaluation.attacks.hijack import measure_hijack
from orchestrator.evaluation.collect import Published, collect
from orchestrator.privacy.bounded.channel import RELEASE_STEP, ChannelConfig
from orchestrator.privacy.guarantee import Guarantee
from orchestrator.runs.observer import SilentObserver
from orchestrator.session import Session
from pipelines import add_task, evaluate, export_head, train
from pipelines.command import execute
from serve.edge.head import Head

QUICK = [
    *("--image-size", "16", "--split-index", "5", "--device", "cpu", "--threads", "1", "--engine", "process"),
    *("--epochs", "2", "--encoder.epochs", "1", "--batch-size", "32", "--encoder.batch-size", "32"),
    *("--accountant", "rdp", "--private", "who"),
]
BOUNDED = ["--task-privacy", "bounded", "--feature-bits", "4"]
FOUR_BITS = ChannelConfig.for_bits(4.0)


def run_train(*flags: str) -> int:
    return execute(
        "orchestrator.settings.train:TrainSettings", train.run, [*QUICK, *flags], prog="train.py", presets=True
    )


def run_add(task: str, *more: str) -> int:
    flags = [task, "--engine", "process", "--threads", "1", "--epochs", "2", *more]
    return execute("orchestrator.settings.add_task:AddTaskSettings", add_task.run, flags, prog="add_task.py")


def catalog(home: Path) -> Catalog:
    return Catalog(f"sqlite:///{home}/mlflow.db", "faces")


def channels(home: Path) -> dict[str, ChannelConfig | None]:
    """Task to what its published guarantee says of its feature."""
    records = catalog(home).tasks("1")
    return {task: Guarantee.from_json(dict(record.guarantee)).channel for task, record in records.items()}


def test_further_epochs_have_noise_of_their_own_for_whoever_was_published_meanwhile(home, write_parquet, monkeypatch):
    """A run that dies in them may be resumed beside other newcomers: other weights under the same noise hold none."""
    assert run_train("--data", write_parquet(), "--phase", "encoder", "--epsilon", "8") == 0
    publish, draw = Catalog.publish_tasks, release.step_normal
    overtaken, drawn = threading.Event(), []

    def overtake(self, version, entries, **rest):
        if [entry.spec.name for entry in entries] == ["pose"] and not overtaken.is_set():
            overtaken.set()
            assert run_add("glasses", *BOUNDED) == 0
        return publish(self, version, entries, **rest)

    def noting(key, *, run, task, step, **rest):
        if task == "pose":
            drawn.append((run, step))
        return draw(key, run=run, task=task, step=step, **rest)

    monkeypatch.setattr(Catalog, "publish_tasks", overtake)
    monkeypatch.setattr(release, "step_normal", noting)
    assert run_add("pose", "--conflict-epochs", "1", *BOUNDED) == 0
    assert overtaken.is_set()
    run = drawn[0][0]
    n = len([name for name, _ in drawn if name == run])
    assert drawn[:n] == [(run, step) for step in range(n)]
    assert drawn[n:] == [(f"{run}, apart from glasses", step) for step in range(n, n + n // 2)]


def test_bounded_tasks_are_published_with_their_bound_behind_an_encoder_that_knows_of_none(home, write_parquet, capsys):
    assert run_train("--data", write_parquet(), "--tasks", "pose,glasses", "--epsilon", "8", *BOUNDED) == 0
    told = capsys.readouterr().out
    assert "features of at most 4.00 bits an image: 3 numbers under noise" in told
    assert "the heads are mlp" in told
    assert "carries at most 4.00 bits about its image" in told
    records = catalog(home).tasks("1")
    assert channels(home) == {"who": FOUR_BITS, "pose": FOUR_BITS, "glasses": FOUR_BITS}
    assert {record.head_config["kind"] for record in records.values()} == {"mlp"}
    for task in ("pose", "glasses"):
        assert records[task].module_config["channel"] == FOUR_BITS.to_json()
        assert records[task].head_config["feature_shape"] == [3, 1, 1]
        assert records[task].dissimilarity["omega"] == 0
        guarantee = Guarantee.from_json(dict(records[task].guarantee))
        assert guarantee.epsilon is not None and guarantee.epochs == 2
        assert "carries at most 4.00 bits" in records[task].guarantee_text
    assert "bits" not in catalog(home).encoder("1")[0].guarantee
    key = home / "keys" / "faces.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = key.read_bytes()[-40:-8]
    for path in home.rglob("*"):
        if path.is_file() and path != key:
            assert secret not in path.read_bytes() and secret.hex().encode() not in path.read_bytes(), path


def test_secrets_are_named_by_the_producer_recorded_and_in_no_endpoint(home, write_parquet, capsys):
    data = ["--data", write_parquet(), "--tasks", "pose", *BOUNDED]
    assert run_train(*data, "--named-secrets", "who,glasses", "--secret-weight", "2") == 0
    told = " ".join(capsys.readouterr().out.split())
    words = "rate penalty 0.1; adversaries on glasses, who, weight 2"
    assert f"Privacy between tasks: by that bound; what was trained beside it ({words}) promises nothing" in told
    assert set(catalog(home).tasks("1")) == {"who", "pose"}
    assert run_add("glasses", *BOUNDED, "--rate-weight", "0") == 0
    assert catalog(home).tasks("1")["glasses"].guarantee["task_privacy"] == ""
    assert run_train(*data, "--named-secrets", "hair") == 2
    assert "no task named 'hair'" in capsys.readouterr().err


def test_bounded_modules_are_trained_under_dp_and_promise_both(home, write_parquet):
    flags = ["--tasks", "pose", "--dp-mode", "surrogate_dp_modules", "--epsilon", "8", *BOUNDED]
    assert run_train("--data", write_parquet(), *flags) == 0
    assert run_add("glasses", *BOUNDED, "--epsilon", "4") == 0
    records = catalog(home).tasks("1")
    for task in ("pose", "glasses"):
        guarantee = Guarantee.from_json(dict(records[task].guarantee))
        assert guarantee.channel == FOUR_BITS and guarantee.epsilon is not None
        assert any("module" in part for part in guarantee.covers)
        assert "carries at most 4.00 bits" in guarantee.statement()
        assert guarantee.task_privacy == "", "what looks at several images is left out"
    assert Guarantee.from_json(dict(records["pose"].guarantee)).epsilon <= 8


@pytest.mark.parametrize(("first", "then"), [([], BOUNDED), (BOUNDED, [])], ids=["bounded added", "beside bounded"])
def test_a_task_of_either_kind_is_added_beside_the_other_and_changes_no_byte_of_it(
    home, write_parquet, capsys, first, then
):
    assert run_train("--data", write_parquet(), "--tasks", "pose", *first) == 0
    before = catalog(home).published_hashes("1")
    assert run_add("glasses", *then, "--omega", "0.1") == 0
    after = catalog(home).published_hashes("1")
    assert {name: after[name] for name in before} == before
    found = channels(home)
    assert found["pose"] == (FOUR_BITS if first else None)
    assert found["glasses"] == (FOUR_BITS if then else None)
    if then:
        assert "not kept apart from pose, who, whose features have another shape" in capsys.readouterr().out


def test_a_private_attribute_that_phase_one_covers_has_a_map_beside_which_tasks_are_bounded(home, write_parquet):
    flags = ["--tasks", "pose", "--epsilon", "8", "--dp-mode", "frozen_head", *BOUNDED, "--omega", "0.1"]
    assert run_train("--data", write_parquet(), *flags) == 0
    assert channels(home) == {"who": None, "pose": FOUR_BITS}
    assert catalog(home).tasks("1")["who"].head_config["kind"] == "backbone"


def test_an_encoder_may_be_trained_together_with_bounded_tasks(home, write_parquet):
    assert run_train("--data", write_parquet(), "--tasks", "pose", "--algorithm", "task", *BOUNDED) == 0
    assert channels(home) == {"who": FOUR_BITS, "pose": FOUR_BITS}


def test_an_interrupted_run_publishes_what_it_would_have_without_the_interruption(home, write_parquet, monkeypatch):
    data = ["--data", write_parquet(), "--tasks", "pose"]
    assert run_train(*data, "--phase", "encoder") == 0
    bounded = [*data, "--phase", "tasks", *BOUNDED]
    real = Session.run_epoch

    def interrupted(self):
        report = real(self)
        if self.step < self.steps_per_epoch * 2:
            raise KeyboardInterrupt
        return report

    monkeypatch.setattr(Session, "run_epoch", interrupted)
    assert run_train(*bounded) == 130
    assert run_train(*bounded, "--resume") == 0
    record = catalog(home).tasks("1")["pose"]
    assert Guarantee.from_json(dict(record.guarantee)).epochs == 2, "those before the interruption count"


def test_a_lost_key_is_not_replaced_while_features_are_published_under_it(home, write_parquet, capsys):
    data = ["--data", write_parquet(), "--tasks", "pose"]
    assert run_train(*data, *BOUNDED) == 0
    (home / "keys" / "faces.key").unlink()
    assert run_add("glasses") == 0, "a task that needs no key is added without one"
    assert run_train(*data, *BOUNDED) == 2
    assert "'pose' of encoder 1 was published under it" in capsys.readouterr().err
    assert not (home / "keys" / "faces.key").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--feature-bits", "4"], "give --task-privacy bounded"),
        (["--feature-cells", "4"], "give --task-privacy bounded"),
        (["--feature-noise-kind", "fresh"], "give --task-privacy bounded"),
        ([*BOUNDED, "--feature-cells", "6"], "a square map"),
        ([*BOUNDED, "--feature-cells", "64"], "64 vectors an image do not fit a map of 4x4: use at most 16 cells"),
        (["--task-privacy", "bounded"], "give --feature-bits"),
        ([*BOUNDED, "--feature-noise", "0.5"], "--feature-bits chooses dimensions and noise itself"),
        (["--task-privacy", "bounded", "--feature-bits", "-1"], "must be a finite number > 0"),
        ([*BOUNDED, "--algorithm", "input", "--epsilon", "8"], "has no privacy between tasks"),
        (["--named-secrets", "who"], "give --task-privacy bounded"),
        ([*BOUNDED, "--named-secrets", "who,who"], "named twice"),
        ([*BOUNDED, "--rate-weight", "-1"], "rate_weight must be a finite number >= 0"),
        (
            [*BOUNDED, "--rate-weight", "0.1", "--dp-mode", "surrogate_dp_modules", "--epsilon", "8"],
            "modules under DP are clipped image by image",
        ),
    ],
)
def test_what_bounded_features_cannot_be_is_refused_in_one_line(home, write_parquet, capsys, flags, said):
    assert run_train("--data", write_parquet(), "--tasks", "pose", *flags) == 2
    assert said in capsys.readouterr().err
    assert not (home / "keys").exists()


def test_a_bounded_task_is_not_added_with_the_rest_of_the_backbone(home, write_parquet, capsys):
    assert run_train("--data", write_parquet(), "--tasks", "pose") == 0
    assert run_add("glasses", *BOUNDED, "--head", "backbone") == 2
    assert "choose --head mlp or linear" in capsys.readouterr().err
    assert run_add("glasses", *BOUNDED, "--head", "linear", "--feature-noise-kind", "fresh") == 0
    record = catalog(home).tasks("1")["glasses"]
    assert record.head_config["kind"] == "linear"
    assert record.guarantee["noise_kind"] == "fresh" and "Every release has noise of its own" in record.guarantee_text


def run_evaluate(*flags: str) -> int:
    return execute(
        "orchestrator.settings.evaluate:EvaluateSettings",
        evaluate.run,
        ["--engine", "process", "--threads", "1", *flags],
        prog="evaluate.py",
    )


def collected(home: Path) -> Published:
    return collect(
        catalog(home), SilentObserver(), encoder_version="latest", data=None, targets=(), storage=home, threads=1
    )


def test_a_bounded_feature_is_evaluated_beside_what_bounds_it(home, write_parquet, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_train("--data", write_parquet(), "--tasks", "pose,glasses", "--epsilon", "8", *BOUNDED) == 0
    assert run_evaluate("--out", str(out)) == 0
    told = capsys.readouterr().out
    assert "bound: no attacker is right more often" in " ".join(told.split())
    assert "What bounded features carry" in told
    numbers = json.loads((out / "evaluation.json").read_text())
    for row in numbers["leakage"]["rows"]:
        assert row["bound"]["bits"] == pytest.approx(4.0)
        assert row["bound"]["accuracy"] == 1.0 or row["target"] == "who"
        assert row["rate_bound"]["bits"] <= row["bound"]["bits"]
        assert row["rate_bound"]["accuracy"] <= row["bound"]["accuracy"]
        assert all(not attack["crashed"] for attack in row["attacks"])
    assert [feature["task"] for feature in numbers["bounded"]] == ["pose", "glasses"]
    for feature in numbers["bounded"]:
        assert feature["bits"] == pytest.approx(4.0)
        assert 0 <= feature["rate"]["low"] <= feature["rate"]["bits"] <= feature["rate"]["high"]
        assert feature["rate"]["n"] == 24
    page = (out / "report.html").read_text()
    assert "carries at most 4.00 bits of its image" in page
    assert "imitate a bounded feature without its noise" in page
    assert "4.00 bits at most" in page


def test_attackers_get_the_bytes_that_are_released_and_the_same_when_asked_again(home, write_parquet):
    assert run_train("--data", write_parquet(), "--tasks", "pose,glasses", *BOUNDED) == 0
    first, again = collected(home), collected(home)
    for task in ("pose", "glasses"):
        z, s = first.features[task].features["test"], first.vectors[task]["test"]
        assert z.tobytes() == again.features[task].features["test"].tobytes()
        assert np.array_equal(z, np.round(z / RELEASE_STEP) * RELEASE_STEP)
        np.testing.assert_allclose(np.square(s).sum(1), 3, rtol=1e-5)
    noise = {
        task: first.features[task].features["test"].reshape(24, 3) - s["test"] for task, s in first.vectors.items()
    }
    assert set(noise) == {"pose", "glasses"}, "the private attribute was trained in phase 1, without a bound"
    for draw in noise.values():
        assert draw.std() == pytest.approx(FOUR_BITS.noise, rel=0.3)
    together = np.corrcoef(noise["pose"].ravel(), noise["glasses"].ravel())[0, 1]
    assert abs(together) < 4 / np.sqrt(72), "two tasks that shared noise would give it away by their difference"


def test_without_its_key_a_bounded_feature_cannot_be_evaluated(home, write_parquet, capsys):
    assert run_train("--data", write_parquet(), "--tasks", "pose", *BOUNDED) == 0
    (home / "keys" / "faces.key").unlink()
    assert run_evaluate("--parts", "leakage", "--attacks", "linear") == 2
    assert "cannot read the noise key" in capsys.readouterr().err


def test_a_hijacker_of_a_bounded_feature_is_measured_on_bounded_features(home, write_parquet, tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.runs.evaluate.measure_hijack", functools.partial(measure_hijack, steps=6))
    assert run_train("--data", write_parquet(), "--tasks", "pose", *BOUNDED) == 0
    assert run_evaluate("--budget", "full", "--parts", "hijack", "--out", str(tmp_path / "out")) == 0
    reports = json.loads((tmp_path / "out" / "evaluation.json").read_text())["hijack"]
    assert [report["feature_shape"] for report in reports] == [[3, 1, 1]] * 2


def digits_catalog(home: Path) -> Catalog:
    return Catalog(f"sqlite:///{home}/mlflow.db", "digits")


def test_a_task_that_answers_with_a_map_is_added_in_bits_an_image_cell_by_cell_and_evaluated(home, tmp_path, capsys):
    assert run_train("--private", "parity", "--tasks", "loop", *BOUNDED) == 0
    before = digits_catalog(home).published_hashes("1")
    dense = ["--task-privacy", "bounded", "--feature-bits", "32", "--feature-cells", "16"]
    assert run_add("thumbnail", *dense, "--epsilon", "4") == 2
    assert "has no guarantee" in capsys.readouterr().err
    assert run_add("thumbnail", *dense) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "at most 32.00 bits an image: 16 cells of 2 bits, each 2 numbers under noise" in told
    assert "a map of 16 cells of at most 2.00 bits each, every one 2 numbers of mean square 1" in told
    assert "the heads are mlp" not in told
    after = digits_catalog(home).published_hashes("1")
    assert {name: after[name] for name in before} == before
    record = digits_catalog(home).tasks("1")["thumbnail"]
    channel = Guarantee.from_json(dict(record.guarantee)).channel
    assert channel == ChannelConfig.for_bits(32.0, cells=16) and channel.bits_per_image == pytest.approx(32)
    assert record.spec.shape == (1, 16, 16) and record.head_config["kind"] == "map"
    assert record.head_config["feature_shape"] == [2, 4, 4] and record.metrics["psnr"] > 5
    written = tmp_path / "thumbnail.onnx"
    exports, flags = "orchestrator.settings.export_head:ExportHeadSettings", ["thumbnail", "--out", str(written)]
    assert execute(exports, export_head.run, flags, prog="export_head.py") == 0
    card = Head.load(written).card
    assert (card.feature_shape, card.answer_shape, card.classes) == ((2, 4, 4), (1, 16, 16), ())
    out = tmp_path / "out"
    assert run_evaluate("--parts", "leakage,reconstruction", "--attacks", "linear", "--out", str(out)) == 0
    numbers = json.loads((out / "evaluation.json").read_text())
    rows = {(row["feature"], row["target"]): row for row in numbers["leakage"]["rows"]}
    assert set(rows) == {("loop", "parity"), ("thumbnail", "loop"), ("thumbnail", "parity")}
    assert rows["thumbnail", "loop"]["bound"]["bits"] == pytest.approx(32)
    assert rows["thumbnail", "loop"]["rate_bound"]["bits"] < 32, "two epochs old, it does not use all that it may"
    assert [f["task"] for f in numbers["bounded"]] == ["loop", "thumbnail"]
    assert {row["feature"] for row in numbers["reconstruction"]["rows"]} == {"encoder", "loop", "thumbnail"}
    assert "a map of 1x16x16; 32.00 bits at most" in (out / "report.html").read_text()


def test_a_map_is_not_what_phase_one_is_trained_on(home, capsys):
    assert run_train("--private", "thumbnail", "--tasks", "loop", "--epsilon", "8") == 2
    assert "thumbnail answers with a map, and what is trained in phase 1" in capsys.readouterr().err
