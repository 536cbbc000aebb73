import http.server
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError, UnavailableError
from orchestrator.mlflow_store import (
    check_reachable,
    masked,
    open_client,
    open_experiment,
    sqlite_path,
    store_errors,
    store_uri,
)


@contextmanager
def server(status: int, body: bytes) -> Iterator[str]:
    """A web server that answers everything alike."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()
            thread.join()


@contextmanager
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("./mlruns", "is a folder"),
        ("/var/mlruns", "is a folder"),
        ("file:///var/mlruns", "is a folder"),
        ("", "is a folder"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("databricks://profile", "of no known kind"),
    ],
)
def test_a_store_of_no_use_is_refused_with_the_ones_that_are(uri: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=rf"{advice}.*sqlite:////absolute/path/mlflow.db.*mlflow server"):
        check_reachable(uri)


def test_a_relative_sqlite_file_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_uri("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"
    assert store_uri(f"sqlite:///{tmp_path}/b.db") == f"sqlite:///{tmp_path}/b.db"
    assert sqlite_path(store_uri("sqlite:///a/b.db")) == tmp_path / "a" / "b.db"
    assert store_uri("https://host:5000/") == "https://host:5000"
    assert sqlite_path("https://host:5000") is None


def test_a_server_that_is_not_there_is_noticed_at_once() -> None:
    open_client_imports_mlflow()
    uri = f"http://127.0.0.1:{closed_port()}"
    with within(3), pytest.raises(UnavailableError, match=rf"no tracking server answers at {uri}: start it"):
        check_reachable(uri)


def open_client_imports_mlflow() -> None:
    """So that the import is not in the time that is measured."""
    import mlflow  # noqa: F401


def test_a_server_that_never_answers_is_given_up_within_the_time_limit() -> None:
    open_client_imports_mlflow()
    with silent_port() as port, within(4), pytest.raises(UnavailableError, match="no tracking server answers"):
        check_reachable(f"http://127.0.0.1:{port}", timeout_s=1)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"not here", r"no healthy MLflow server \(/health: 404\)"),
        (200, b"<html>some shop</html>", "no healthy MLflow server"),
        (503, b"", "no healthy MLflow server"),
        (401, b"who are you", r"refuses us \(401 who are you\): set MLFLOW_TRACKING_USERNAME"),
        (403, b"Invalid Host header", "refuses us"),
    ],
)
def test_what_answers_but_is_no_mlflow_server_for_us_is_named(status: int, body: bytes, message: str) -> None:
    with server(status, body) as uri, within(10), pytest.raises(UnavailableError, match=message):
        check_reachable(uri)


def test_a_healthy_server_passes() -> None:
    with server(200, b"OK") as uri:
        check_reachable(uri)


def test_a_database_that_is_not_there_is_noticed_at_once_and_its_password_is_not_told() -> None:
    uri = f"postgresql://user:secret@127.0.0.1:{closed_port()}/mlflow"
    with within(10), pytest.raises(UnavailableError, match="cannot use the database") as caught:
        check_reachable(uri)
    assert "secret" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)
    assert masked("http://host/x@y") == "http://host/x@y"


def test_a_file_that_is_no_database_or_cannot_be_made_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at " * 100)
    with within(10), pytest.raises(UnavailableError, match="file is not a database"):
        open_client(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(UnavailableError, match="Not a directory"):
        check_reachable(f"sqlite:///{tmp_path}/text.db/below/m.db")


def test_a_database_that_somebody_keeps_locked_is_refused_after_the_time_limit(tmp_path: Path) -> None:
    database = tmp_path / "m.db"
    with sqlite3.connect(database) as other:
        other.execute("BEGIN EXCLUSIVE")
        with within(5), pytest.raises(UnavailableError, match="locked"):
            check_reachable(f"sqlite:///{database}", timeout_s=0.3)
        other.rollback()
    other.close()


CHILD = """
import sys
from orchestrator.mlflow_store import open_client, open_experiment
client = open_client(sys.argv[1])
print(open_experiment(client, sys.argv[1], "shared experiment"))
"""


def test_processes_that_open_a_new_store_at_the_same_time_share_it_silently(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/folder/mlflow.db"
    command = [sys.executable, "-W", "error", "-c", CHILD, uri]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    children = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        )
        for _ in range(2)
    ]
    answers = [child.communicate(timeout=240) for child in children]
    assert [err for _, err in answers] == [""] * 2
    assert len({out for out, _ in answers}) == 1
    client = open_client(uri)
    experiment = client.get_experiment(answers[0][0].strip())
    assert experiment.name == "shared experiment"
    assert experiment.artifact_location == str(tmp_path / "new" / "folder" / "artifacts" / "shared_experiment")
    assert not (tmp_path / "mlruns").exists()

    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(UnavailableError, match="has been deleted"):
        open_experiment(client, uri, "shared experiment")


def test_mlflows_own_settings_stay_as_the_user_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    with server(200, b"OK") as uri:
        check_reachable(uri)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_mlflows_errors_become_ours_and_ours_stay() -> None:
    from mlflow.exceptions import MlflowException

    with (
        pytest.raises(UnavailableError, match=r"MLflow at http://\*\*\*@host failed: first line$"),
        store_errors("http://me:pw@host"),
    ):
        raise MlflowException("first line\nsecond line")
    with pytest.raises(ConfigError, match="mine"), store_errors("http://host"):
        raise ConfigError("mine")
