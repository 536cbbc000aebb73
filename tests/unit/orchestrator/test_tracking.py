import errno
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from waiting import wait_for

from orchestrator import tracking
from orchestrator.errors import ConfigError, UnavailableError
from orchestrator.mlflow_store import open_client
from orchestrator.tracking import Tracker, open_tracker
from orchestrator.tracking_records import Spool


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for the module: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def opened(store: str, spool: Path, **options: Any) -> Tracker:
    chosen = {"experiment": "unit", "run_name": "a run", "params": {}, "tags": {}} | options
    return open_tracker(store, spool=spool, **chosen)


# -- a store that works ------------------------------------------------------------------------------------------------


def test_everything_that_is_logged_arrives(store: str, tmp_path: Path) -> None:
    params = {f"section.key{i}": i for i in range(230)} | {"long": "x" * 7000}
    parent = opened(store, tmp_path / "spool")
    tracker = opened(store, tmp_path / "spool", parent_run_id=parent.run_id, params=params, tags={"command": "train"})
    for step in range(3):
        tracker.log_metrics(step, {"smile/loss": 1.0 / (step + 1), "similarity/a|b": step})
    tracker.log_metrics(9, {f"m{i}": i for i in range(1100)})
    tracker.set_tags({"guarantee": "none", "encoder_version": 3})
    figure = Figure()
    figure.subplots().plot([1, 2])
    tracker.log_figure(figure, "plots/training.png")
    (tmp_path / "report.md").write_text("before")
    tracker.log_file(tmp_path / "report.md", "reports")
    (tmp_path / "report.md").write_text("after")
    tracker.log_text("grün", "guarantee.txt")
    tracker.log_json({"a": [1, None]}, "unchanged.json")
    assert tracker.finish("FINISHED") == 0
    assert parent.finish("KILLED") == 0

    client = open_client(store)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a run"
    assert run.data.params == {k: str(v) for k, v in params.items()} | {"long": "x" * 6000}
    assert {"command": "train", "guarantee": "none", "encoder_version": "3"}.items() <= run.data.tags.items()
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    history = client.get_metric_history(tracker.run_id, "smile/loss")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert run.data.metrics["similarity/a_b"] == 2
    assert run.data.metrics["m1099"] == 1099
    assert client.get_run(parent.run_id).info.status == "KILLED"
    assert not (tmp_path / "spool" / tracker.run_id).exists()

    folder = Path(client.download_artifacts(tracker.run_id, "", str(tmp_path)))
    assert (folder / "plots" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "reports" / "report.md").read_text() == "before"
    assert (folder / "guarantee.txt").read_text(encoding="utf-8") == "grün"
    assert json.loads((folder / "unchanged.json").read_text()) == {"a": [1, None]}
    assert tracker.run_id in tracker.run_url


def test_metrics_that_are_not_finite_are_left_out_counted_and_named(store: str, tmp_path: Path) -> None:
    tracker = opened(store, tmp_path)
    tracker.log_metrics(0, {"loss": 1.0, "auc": math.nan})
    tracker.log_metrics(1, {"loss": math.inf, "auc": math.nan})
    assert tracker.finish() == 0
    data = open_client(store).get_run(tracker.run_id).data
    assert data.metrics == {"loss": 1.0}
    assert data.tags["not_finite.auc"] == "nan, first at step 0"
    assert data.tags["not_finite.loss"] == "inf, first at step 1"
    assert data.tags["not_finite_metrics"] == "3"


def test_nothing_is_written_to_the_terminal(store: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = opened(store, tmp_path, params={"a": 1})
    tracker.log_text("x", "x.txt")
    tracker.finish()
    assert capfd.readouterr() == ("", "")


def test_a_store_of_no_use_is_refused_when_the_tracker_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        opened("./mlruns", tmp_path)
    start = time.monotonic()
    with pytest.raises(UnavailableError, match="no tracking server answers"):
        opened("http://127.0.0.1:1", tmp_path)
    assert time.monotonic() - start < 5


def test_what_the_store_refuses_is_kept_and_the_rest_is_sent(store: str, tmp_path: Path) -> None:
    tracker = opened(store, tmp_path, params={"lr": 1})
    tracker._retry_s = 0.01
    tracker.log_params({"lr": 2})  # a parameter never changes
    tracker.log_metrics(0, {"loss": 0.5})
    assert tracker.finish() == 1
    assert kept(tmp_path, tracker) == [("params", {"lr": "2"})]
    run = open_client(store).get_run(tracker.run_id)
    assert (run.data.params, run.data.metrics, run.info.status) == ({"lr": "1"}, {"loss": 0.5}, "FINISHED")


# -- a store that does not ---------------------------------------------------------------------------------------------


class FakeClient:
    """An MLflow that can be away, or hang."""

    def __init__(self) -> None:
        self.away = False
        self.hanging = threading.Event()
        self.hanging.set()
        self.calls = 0
        self.received: list[Any] = []

    def _receive(self, thing: Any) -> None:
        self.calls += 1
        self.hanging.wait(60)
        if self.away:
            raise ConnectionError("connection refused\nand a long story")
        self.received.append(thing)

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        self._receive({m.key: getattr(m, "value", None) for m in (*metrics, *params, *tags)})

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        self._receive((folder, Path(path).name, Path(path).read_text()))

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self._receive(status)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()

    def check(uri: str) -> None:
        if fake.away:
            raise UnavailableError("away")

    monkeypatch.setattr(tracking, "check_reachable", check)
    return fake


def tracking_to(client: FakeClient, spool: Path, **options: Any) -> Tracker:
    chosen: dict[str, Any] = {"retry_s": 0.02} | options
    return Tracker(client, uri="http://h", experiment_id="1", run_id="r1", spool=spool, **chosen)  # type: ignore[arg-type]


def kept(spool: Path, tracker: Tracker) -> list[tuple[str, Any]]:
    lines = (spool / tracker.run_id / "unsent.jsonl").read_text().splitlines()
    return [(entry["kind"], entry["content"]) for entry in map(json.loads, lines)]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def test_records_wait_while_the_server_is_away_and_arrive_in_order_when_it_is_back(
    client: FakeClient, tmp_path: Path
) -> None:
    tracker = tracking_to(client, tmp_path)
    client.away = True
    for step in range(20):
        tracker.log_metrics(step, {"loss": step})
    tracker.log_text("hello", "a/b.txt")
    wait_for(lambda: client.calls > 3, 30)
    assert client.received == []
    client.away = False
    wait_for(lambda: len(client.received) == 21, 30)
    assert tracker.finish() == 0
    assert client.received == [*({"loss": float(s)} for s in range(20)), ("a", "b.txt", "hello"), "FINISHED"]
    assert not (tmp_path / "r1").exists()


def test_what_never_arrives_is_in_the_spool_and_counted_and_warned_of_once(
    client: FakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client.away = True
    tracker = tracking_to(client, tmp_path)
    for step in range(5):
        tracker.log_metrics(step, {"loss": step})
    tracker.log_text("kept", "guarantee.txt")
    with within(5):
        assert tracker.finish("FAILED", timeout_s=3) == 7
    assert tracker.finish("FINISHED") == 7
    entries = kept(tmp_path, tracker)
    assert [kind for kind, _ in entries] == ["metrics"] * 5 + ["artifact", "status"]
    assert [content["values"] for _, content in entries[:5]] == [{"loss": float(s)} for s in range(5)]
    assert entries[-1][1]["status"] == "FAILED"
    (line,) = [x for x in (tmp_path / "r1" / "unsent.jsonl").read_text().splitlines() if "artifact" in x]
    assert Path(json.loads(line)["file"]).read_text() == "kept"
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert warnings[0].startswith(
        "MLflow does not take what is logged (http://h: connection refused). Training goes on"
    )
    assert warnings[1].startswith("7 records were not sent")


def test_a_hanging_server_holds_nobody_up(client: FakeClient, tmp_path: Path) -> None:
    client.hanging.clear()
    tracker = tracking_to(client, tmp_path, capacity=10)
    with within(2):
        for step in range(100):
            tracker.log_metrics(step, {"loss": step})
    with within(3):
        unsent = tracker.finish(timeout_s=0.5)
    assert unsent == 101
    steps = sorted(content["step"] for kind, content in kept(tmp_path, tracker) if kind == "metrics")
    assert steps == list(range(100))
    client.hanging.set()
    tracker._thread.join(10)
    assert not tracker._thread.is_alive()
    assert len(kept(tmp_path, tracker)) == 101


def test_a_record_that_a_reachable_server_refuses_is_given_up_after_a_few_attempts(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "check_reachable", lambda uri: None)
    client.away = True
    tracker = tracking_to(client, tmp_path)
    tracker.log_metrics(0, {"loss": 0})
    wait_for((tmp_path / "r1" / "unsent.jsonl").exists, 30)
    assert client.calls == 3
    client.away = False
    assert tracker.finish() == 1
    assert client.received == ["FINISHED"]


@pytest.mark.parametrize(
    "log",
    [
        lambda t: t.log_metrics(0, {"loss": "high"}),
        lambda t: t.log_metrics(0, {"loss": None}),
        lambda t: t.log_metrics(0, None),
        lambda t: t.log_file(Path("/nowhere/x"), "reports"),
        lambda t: t.log_json(object(), "x.json"),
        lambda t: t.log_figure(None, "x.png"),
        lambda t: t.log_figure(Figure(), "x.no-such-format"),
        lambda t: t.log_text("text", "/"),
        lambda t: t.log_text("text", "../../elsewhere.txt"),
    ],
)
def test_what_cannot_be_logged_is_a_warning_and_not_an_error(
    client: FakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture, log: Callable[[Tracker], None]
) -> None:
    tracker = tracking_to(client, tmp_path)
    log(tracker)
    tracker.log_metrics(1, {"loss": 1})
    assert tracker.finish() == 1
    assert client.received == [{"loss": 1.0}, "FINISHED"]
    assert "a record could not be made" in caplog.text


def test_a_full_disk_under_the_spool_is_a_warning_and_not_an_error(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    client.away = True
    tracker = tracking_to(client, tmp_path)
    monkeypatch.setattr(Path, "mkdir", full)
    monkeypatch.setattr(Path, "open", full)
    tracker.log_metrics(0, {"loss": 1})
    tracker.log_text("x", "x.txt")
    assert tracker.finish(timeout_s=2) == 3
    assert "not even the spool takes what is logged" in caplog.text


def test_what_is_logged_after_the_end_goes_to_the_spool(client: FakeClient, tmp_path: Path) -> None:
    tracker = tracking_to(client, tmp_path)
    tracker.finish()
    tracker.log_metrics(3, {"late": 1})
    assert tracker.finish() == 1
    assert kept(tmp_path, tracker)[0][1]["values"] == {"late": 1.0}
    assert client.received == ["FINISHED"]


def test_threads_may_log_at_the_same_time(client: FakeClient, tmp_path: Path) -> None:
    tracker = tracking_to(client, tmp_path)

    def log(worker: int) -> None:
        for i in range(20):
            tracker.log_metrics(i, {f"w{worker}": i})
            tracker.log_text(f"{worker}-{i}", f"{worker}/{i}.txt")

    threads = [threading.Thread(target=log, args=(w,)) for w in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tracker.finish() == 0
    texts = {thing[2] for thing in client.received if isinstance(thing, tuple)}
    assert texts == {f"{w}-{i}" for w in range(4) for i in range(20)}
    assert len(client.received) == 161


def test_the_url_of_a_run_has_no_password_in_it(client: FakeClient, tmp_path: Path) -> None:
    tracker = Tracker(client, uri="https://me:pw@host", experiment_id="7", run_id="abc", spool=tmp_path)  # type: ignore[arg-type]
    tracker.finish()
    assert tracker.run_url == "https://***@host/#/experiments/7/runs/abc"


def test_the_spool_counts_a_record_even_if_it_cannot_write_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    spool = Spool(tmp_path / "file" / "run", run_id="r")
    with pytest.raises(OSError, match="Not a directory"):
        spool.keep(tracking.Record(kind="tags", content={}))
    assert spool.unsent == 1
