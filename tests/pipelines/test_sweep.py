"""A sweep as a command: what it trains, reuses, charges, writes down and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from tiny import ROOT

from orchestrator.catalog import Catalog
from orchestrator.errors import UnavailableError
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.privacy.guarantee import Guarantee
from orchestrator.privacy.ledger import Account, Ledger, LedgerCharge
from orchestrator.runs.observer import SilentObserver
from orchestrator.runs.opening import open_data
from orchestrator.settings.shared import DataSettings
from orchestrator.sweep import trial as trial_module
from orchestrator.sweep.plan import Plan
from orchestrator.sweep.store import Store
from pipelines import sweep
from pipelines.command import execute

QUICK = [
    *("--image-size", "16", "--network.head", "linear", "--device", "cpu", "--split-index", "5", "--engine", "process"),
    *("--epochs", "2", "--encoder.epochs", "1", "--batch-size", "32", "--encoder.batch-size", "32"),
    *("--dp.accountant", "rdp", "--private", "who", "--tasks", "pose,glasses"),
]
SETTINGS = "orchestrator.sweep.settings:SweepSettings"
NO_ATTACKS = ["--objectives", "utility,epsilon"]


@pytest.fixture
def few_attackers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two that take no time."""
    few = AttackBudget.preset("quick").only(("linear", "knn"))
    monkeypatch.setattr(trial_module, "attackers", lambda: few)


def run_sweep(*flags: str) -> int:
    try:
        return execute(SETTINGS, sweep.run, [*QUICK, *flags], prog="sweep.py", presets=True)
    except SystemExit as end:
        return int(end.code or 0)


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert not any(line.startswith("Traceback") for line in lines), "a user's mistake must not show a trace"
    return lines[-1]


def account(home: Path) -> Account:
    with Ledger(home / "ledger.db") as ledger:
        (found,) = ledger.accounts()
        return found


def result(out: Path) -> dict:
    return json.loads((out / "sweep.json").read_text())


def test_encoders_are_trained_once_charged_once_and_shared(home, write_parquet, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--data", write_parquet(), "--omega", "0,1e-3", "--epsilon", "2,none", *NO_ATTACKS]
    assert run_sweep(*flags, "--out", str(out)) == 0
    told = capsys.readouterr().out
    assert told.index("Plan.") < told.index("encoder  split 5, epsilon 2, seed 0: training")
    found = result(out)
    assert found["encoders_trained"] == 2 and len(found["trials"]) == 4
    assert [t["reused"] for t in found["trials"]] == [["encoder"], ["encoder", "features"]] * 2
    spent = account(home)
    assert [(e.charged, e.released) for e in spent.entries] == [(2, True)]
    notes = " ".join(what for _, _, what in spent.outside)
    assert "a sweep compared 4 trials by looking at validation images" in notes and "4 trials of a sweep" in notes
    assert found["epsilon_spent"] == pytest.approx(found["plan"]["epsilon_total"])
    assert {t["values"]["epsilon"] for t in found["trials"]} == {"infinite", spent.spent(1e-2)}
    catalog = Catalog(f"sqlite:///{home}/mlflow.db", "faces-sweep")
    assert [Guarantee.from_json(dict(e.guarantee)).epsilon is None for e in catalog.encoders()] == [False, True]
    assert [list(catalog.tasks(v)) for v in ("1", "2")] == [[], ["who"]], "phase 1 without DP has no stand-in"

    # A second sweep over other omegas finds both, and costs nothing.
    again = tmp_path / "again"
    flags = ["--data", write_parquet(), "--omega", "1,10", "--epsilon", "2,none", *NO_ATTACKS]
    assert run_sweep(*flags, "--out", str(again)) == 0
    assert "0 encoder(s) to train, 2 found in the catalog" in capsys.readouterr().out
    assert result(again)["encoders_trained"] == 0
    assert len(account(home).entries) == 1 and len(catalog.encoders()) == 2


def test_numbers_tables_figures_report_and_nested_runs_are_written(
    home, write_parquet, tmp_path, capsys, few_attackers
):
    out = tmp_path / "out"
    flags = ["--data", write_parquet(), "--omega", "0,1", "--dp.epsilon", "4", "--seeds", "0,1", "--ceilings"]
    assert run_sweep(*flags, "--report", "--out", str(out)) == 0
    told = capsys.readouterr().out
    assert "What no other choice beats in utility, leakage, epsilon" in told
    assert "chosen by looking at private validation images" in told
    found = result(out)
    assert found["chosen_on"] == "the validation subset" and found["encoders_trained"] == 2
    for trial in found["trials"]:
        pairs = {(leak["feature"], leak["target"]) for leak in trial["leaks"]}
        assert pairs == {("pose", "glasses"), ("pose", "who"), ("glasses", "pose"), ("glasses", "who")}
        assert trial["values"]["leakage"] == max(leak["excess"] for leak in trial["leaks"])
        assert set(trial["ceilings"]) == {"who", "pose", "glasses"}
        assert trial["values"]["bytes"] == 2 * 64 * 4 * 4
    assert [("ceilings" in t["reused"]) for t in sorted(found["trials"], key=lambda t: t["point"]["seed"])] == [
        False,
        True,
    ] * 2
    table = pq.read_table(out / "sweep.parquet")
    assert table.num_rows == 4 and {"omega", "utility", "leakage", "on_front", "excess_pose_on_who"} <= {
        *table.column_names
    }
    page = (out / "report.html").read_text()
    assert "If nothing were held back" in page
    assert "What the sweep cost" in page and "no epsilon covers it" in page
    assert (out / "figures" / "pareto.png").stat().st_size > 5_000
    assert (out / "figures" / "response.svg").exists()

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("metamorphosis-faces-sweep")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(nested) == 4 and {run.info.status for run in runs} == {"FINISHED"}
    assert all({"omega", "epsilon", "split_index", "feature_bits", "seed"} == set(run.data.params) for run in nested)
    assert all({"utility", "leakage", "epsilon"} <= set(run.data.metrics) for run in nested)
    assert {"report.html", "sweep.json", "sweep.parquet"} <= {a.path for a in client.list_artifacts(parent.info.run_id)}
    mlflow.set_tracking_uri(None)


def test_trials_are_compared_on_the_validation_subset(home, write_parquet, tmp_path, monkeypatch, few_attackers):
    seen, whole = [], trial_module.evaluate_leakage

    def watched(features, labels, *rest, **named):
        seen.append({task: tuple(by_subset["test"]) for task, by_subset in labels.items()})
        return whole(features, labels, *rest, **named)

    monkeypatch.setattr(trial_module, "evaluate_leakage", watched)
    out = tmp_path / "out"
    assert run_sweep("--data", write_parquet(), "--omega", "0,1", "--dp.epsilon", "4", "--out", str(out)) == 0
    opened = open_data(DataSettings(data=write_parquet(), image_size=16), SilentObserver())
    labels = opened.training_data(("who", "pose", "glasses")).labels
    assert seen == [{task: tuple(by_subset["validation"]) for task, by_subset in labels.items()}] * 2
    for trial in result(out)["trials"]:
        mean = sum(trial["validation"][task]["accuracy"] for task in ("pose", "glasses")) / 2
        assert trial["values"]["utility"] == pytest.approx(mean)


def test_the_best_is_published_under_an_alias_with_what_it_was_chosen_from(home, write_parquet, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--data", write_parquet(), "--omega", "0,1", "--epsilon", "2,8", *NO_ATTACKS]
    assert run_sweep(*flags, "--register", "--out", str(out)) == 0
    found = result(out)
    assert set(found["registered"]) == {"utility", "epsilon"}
    catalog = Catalog(f"sqlite:///{home}/mlflow.db", "faces-sweep")
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    for objective, version in found["registered"].items():
        assert client.get_model_version_by_alias("faces-sweep.encoder", f"best-{objective}").version == int(version)
        record, _ = catalog.encoder(version)
        assert (
            "was chosen from 4 trained models by looking at private validation images"
            in Guarantee.from_json(dict(record.guarantee)).statement()
        )
        tasks = catalog.tasks(version)
        assert set(tasks) == {"who", "pose", "glasses"} and tasks["who"].private
        best = next(t for t in found["trials"] if t["id"] == found["best"][objective][0])
        assert tasks["pose"].metrics["accuracy"] == best["test"]["pose"]["accuracy"]
        assert tasks["pose"].dissimilarity["omega"] == best["point"]["omega"]
        assert "chosen from 4" in tasks["pose"].guarantee_text
    assert not list((home / "sweeps").glob("*/weights/*")), "what is published need not be kept twice"
    # A further sweep takes the shared encoders, not their published copies.
    assert run_sweep("--data", write_parquet(), "--omega", "2,3", "--epsilon", "2,8", *NO_ATTACKS) == 0
    assert "2 found in the catalog" in capsys.readouterr().out


def test_a_sweep_that_would_overspend_is_refused_before_it_starts(home, write_parquet, capsys):
    data = write_parquet()
    assert run_sweep("--data", data, "--omega", "0,1", "--dp.epsilon", "2", *NO_ATTACKS) == 0
    images = account(home).fingerprint
    with Ledger(home / "ledger.db") as ledger:
        ledger.set_limit(images, "faces", epsilon=4.0, delta=1e-2)
    before = account(home)
    capsys.readouterr()
    # Each of the three alone would have room.
    assert run_sweep("--data", data, "--omega", "0,1", "--epsilon", "1,2,2.5", "--seeds", "1", *NO_ATTACKS) == 2
    captured = capsys.readouterr()
    said = captured.err.splitlines()[-1]
    assert "would overspend the privacy budget of faces" in said and "the limit is 4" in said
    assert "with this sweep; the limit is 4" in captured.out, "the plan is printed all the same"
    assert "encoder  split" not in captured.out
    after = account(home)
    assert after.entries == before.entries and len(list((home / "sweeps").iterdir())) == 2
    assert len(Catalog(f"sqlite:///{home}/mlflow.db", "faces-sweep").encoders()) == 1


def test_a_trial_that_fails_is_reported_and_the_rest_go_on_and_resume_tries_it_again(
    home, write_parquet, tmp_path, capsys, monkeypatch
):
    data, out = write_parquet(), tmp_path / "out"
    whole = trial_module.run_session

    def fragile(plan, *rest, **named):
        if plan.dissimilarity.omega == 1.0:
            raise MemoryError("no room")
        return whole(plan, *rest, **named)

    monkeypatch.setattr(trial_module, "run_session", fragile)
    flags = ["--data", data, "--omega", "0,1,2", "--dp.epsilon", "2", *NO_ATTACKS, "--out", str(out)]
    assert run_sweep(*flags) == 0
    told = capsys.readouterr().out
    assert "FAILED: MemoryError: no room" in told and "--resume tries 1 of them again" in told
    found = result(out)
    assert [t["status"] for t in found["trials"]] == ["done", "failed", "done"]
    assert len(found["front"]) >= 1

    trained: list[float] = []

    def counted(plan, *rest, **named):
        trained.append(plan.dissimilarity.omega)
        return whole(plan, *rest, **named)

    monkeypatch.setattr(trial_module, "run_session", counted)
    assert run_sweep(*flags, "--resume") == 0
    assert trained == [1.0]
    assert [t["status"] for t in result(out)["trials"]] == ["done"] * 3
    assert result(out)["encoders_trained"] == 1 and len(account(home).entries) == 1
    assert run_sweep(*flags, "--resume") == 2
    assert "nothing to resume" in complaint(capsys)


@pytest.mark.parametrize("engine", ["process", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_sweep_whose_driver_is_killed_goes_on_repeats_nothing_and_costs_the_same(
    home, write_parquet, tmp_path, engine
):
    """SIGKILL in the middle: after the first of four trials, while the second is being trained."""
    data, out = write_parquet(), tmp_path / "out"
    flags = [*QUICK, "--data", data, "--omega", "0,1", "--epsilon", "2,4", "--dp.noise-seed", "7", *NO_ATTACKS]
    flags += ["--out", str(out), "--engine", engine]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "pipelines/sweep.py", *flags]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    records = home / "sweeps"
    deadline = time.monotonic() + 300
    try:
        while not list(records.glob("*/trials/*.json")):
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {path: path.read_bytes() for path in records.glob("*/trials/*.json")}
    assert 1 <= len(before) < 4 and not (out / "sweep.json").exists()

    done = subprocess.run(
        [*command, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = result(out)
    assert [t["status"] for t in found["trials"]] == ["done"] * 4
    assert {path: path.read_bytes() for path in before} == before
    assert done.stdout.count("; done before") >= len(before), "a worker may outlive the driver by a trial"
    disturbed = account(home)

    # The same sweep, undisturbed, in a ledger of its own.
    (home.parent / "other").mkdir()
    undisturbed = subprocess.run(
        [*command, "--storage", str(home.parent / "other")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert undisturbed.returncode == 0, undisturbed.stderr
    other = account(home.parent / "other")
    mine, theirs = (
        sorted((e.mechanism.noise_multiplier, e.mechanism.steps, e.charged) for e in a.entries)
        for a in (disturbed, other)
    )
    assert mine == theirs and disturbed.spent(1e-2) == other.spent(1e-2)
    values = {t["id"]: t["values"]["utility"] for t in result(out)["trials"]}
    assert values == {t["id"]: t["values"]["utility"] for t in found["trials"]}


def test_an_encoder_that_was_in_the_making_takes_its_steps_again_and_is_not_charged_twice(
    home, write_parquet, monkeypatch
):
    """Its noise comes from the operating system: only the same secret takes the same steps."""
    whole = LedgerCharge.__call__

    def interrupted(charge, step):
        whole(charge, step)
        if step == 2:
            raise KeyboardInterrupt

    flags = ["--data", write_parquet(), "--omega", "0,1", "--dp.epsilon", "2", *NO_ATTACKS]
    with monkeypatch.context() as patch:
        patch.setattr(LedgerCharge, "__call__", interrupted)
        assert run_sweep(*flags) == 130
    assert [(e.charged, e.released) for e in account(home).entries] == [(2, False)]
    assert run_sweep(*flags, "--resume") == 0
    assert [(e.charged, e.mechanism.steps, e.released) for e in account(home).entries] == [(2, 2, True)]


def test_reservations_are_made_for_all_encoders_or_for_none(home, write_parquet, capsys, monkeypatch):
    """Another process spends what was free between the plan and the reservations."""
    data = write_parquet()
    assert run_sweep("--data", data, "--omega", "0,1", "--dp.epsilon", "2", *NO_ATTACKS) == 0
    with Ledger(home / "ledger.db") as ledger:
        ledger.set_limit(account(home).fingerprint, "faces", epsilon=4.0, delta=1e-2)
    before = account(home)
    monkeypatch.setattr(Plan, "check", lambda self: None)
    assert run_sweep("--data", data, "--omega", "0,1", "--epsilon", "1,2,2.5", "--seeds", "1", *NO_ATTACKS) == 2
    assert "does not have room" in complaint(capsys)
    after = account(home)
    assert after.committed(1e-2) == before.committed(1e-2)
    assert all(e.released and not e.charged for e in after.entries[1:]) and len(after.entries) > 1


def test_a_tracking_store_that_goes_away_stops_no_trial(home, write_parquet, tmp_path, monkeypatch, caplog):
    def away(*_, **__):
        raise UnavailableError("MLflow is gone")

    monkeypatch.setattr("orchestrator.sweep.tracked.open_tracker", away)
    out = tmp_path / "out"
    flags = ["--data", write_parquet(), "--omega", "0,1", "--dp.epsilon", "2", *NO_ATTACKS]
    assert run_sweep(*flags, "--out", str(out)) == 0
    assert [t["status"] for t in result(out)["trials"]] == ["done"] * 2
    assert "MLflow is gone" in caplog.text


def test_a_resumed_sweep_goes_on_under_its_new_parent_run(home, write_parquet, tmp_path, monkeypatch):
    whole, calls = trial_module.run_session, []

    def interrupted(plan, *rest, **named):
        calls.append(plan)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(plan, *rest, **named)

    monkeypatch.setattr(trial_module, "run_session", interrupted)
    flags = ["--data", write_parquet(), "--omega", "0,1", "--dp.epsilon", "2", *NO_ATTACKS]
    assert run_sweep(*flags) == 130
    assert run_sweep(*flags, "--resume", "--out", str(tmp_path / "out")) == 0
    assert len(calls) == 3 and result(tmp_path / "out")["encoders_trained"] == 1
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("metamorphosis-faces-sweep")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in parents] == ["FINISHED", "KILLED"]
    nested = [run.data.tags["mlflow.parentRunId"] for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert nested == [parents[0].info.run_id] * 2
    assert len(account(home).entries) == 1


def test_bounded_features_are_swept_over_and_their_trials_key_is_gone(home, write_parquet, tmp_path, few_attackers):
    out = tmp_path / "out"
    flags = ["--data", write_parquet(), "--feature-bits", "2,none", "--dp.epsilon", "4"]
    assert run_sweep(*flags, "--out", str(out)) == 0
    trials = {t["point"]["feature_bits"]: t for t in result(out)["trials"]}
    assert trials[2.0]["values"]["bytes"] == 4 and trials[None]["values"]["bytes"] == 2 * 64 * 4 * 4
    assert trials[2.0]["point"]["omega"] == 0 and trials[None]["point"]["omega"] == 0.001
    assert result(out)["encoders_trained"] == 1
    assert not list(home.rglob("*.key"))


def test_random_and_optuna_try_as_many_as_they_are_told(home, write_parquet, tmp_path):
    data = write_parquet()
    for search, where in (("random", tmp_path / "r"), ("optuna", tmp_path / "o")):
        flags = ["--search", search, "--trials", "4", "--omega", "loguniform:1e-4:1", "--epsilon", "2,none"]
        assert run_sweep("--data", data, *flags, *NO_ATTACKS, "--out", str(where)) == 0
        found = result(where)
        points = [(t["point"]["omega"], t["point"]["epsilon"]) for t in found["trials"]]
        assert len(set(points)) == 4 and all(1e-4 <= omega <= 1 for omega, _ in points)
        assert found["plan"]["exact"] == (search == "random")
    assert len(account(home).entries) <= 1, "epsilon 2 was trained once for both"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--omega", ""], "the space is empty"),
        (["--omega", "0"], "a single point"),
        (["--omega", "0,1", "--objectives", "utility,beauty"], "no objective named 'beauty'"),
        (["--omega", "0,1", "--private", "site"], "at least two"),
        (["--omega", "0,1", "--tasks", "pose,who"], "either hidden or sold"),
        (["--omega", "0,1", "--tasks", "pose,hair"], "no task named 'hair'"),
        (["--split-index", "5,10"], "split index of resnet18 must be between 1 and 9"),
        (["--feature-bits", "0,2"], "must be > 0"),
        (["--omega", "loguniform:1e-4:1"], "a grid needs values"),
        (["--omega", "0,1", "--storage", "/proc/nowhere"], "nowhere"),
        (["--omega", "0,1", "--storage", "nowhere://x"], "no known kind"),
        (["--omega", "0,1", "--out", "/proc/nowhere"], "/proc/nowhere"),
        (["--omega", "0,1", "--resume"], "nothing to resume"),
        (["--omega", "0,1", "--preset", "nope"], "known: celeba"),
    ],
)
def test_a_mistake_gets_one_line_and_trains_nothing(home, write_parquet, capsys, monkeypatch, flags, said):
    monkeypatch.setattr("orchestrator.sweep.encoders.train_encoder_here", lambda job: pytest.fail("a training began"))
    status = run_sweep("--data", write_parquet(), "--dp.epsilon", "2", *flags)
    told = complaint(capsys)
    assert said in told and status in (1, 2)
    assert not (home / "ledger.db").exists() or not account(home).entries


def test_no_private_attribute_is_refused(home, write_parquet, capsys):
    flags = [flag for flag in QUICK if flag not in ("--private", "who")]
    status = execute(
        SETTINGS,
        sweep.run,
        [*flags, "--data", write_parquet(), "--omega", "0,1"],
        prog="sweep.py",
    )
    assert status == 2 and "no attribute to measure leakage on" in complaint(capsys)


def test_what_workers_need_goes_through_a_url(home, write_parquet, tmp_path, monkeypatch):
    """With a URL nothing of the sweep's results depends on the storage folder of the driver."""
    monkeypatch.setenv("METAMORPHOSIS_SCRATCH", str(tmp_path / "scratch"))
    flags = ["--data", write_parquet(), "--omega", "0,1", "--dp.epsilon", "2", *NO_ATTACKS, "--report"]
    assert run_sweep(*flags, "--storage", f"file://{tmp_path}/bucket") == 0
    (run,) = (tmp_path / "bucket" / "sweeps").iterdir()
    store = Store(f"file://{run}")
    assert len(store.names("trials")) == 2 and len(store.names("encoders")) == 1
    assert {"sweep.json", "sweep.parquet", "report.html"} <= set(store.names(""))
    assert list((tmp_path / "scratch" / "features").glob("*.npy")) and not (home / "features").exists()
    assert (home / "ledger.db").exists()
