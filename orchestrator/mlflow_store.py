"""The one way into MLflow: tried before it is used, quiet on the terminal, and with errors that say what to do.

Runs, metrics and the registry of published models are behind one URI: a SQLite file, a database, or a tracking server.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from orchestrator.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_TIMEOUT_S = 5.0
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_ADVICE = "use sqlite:////absolute/path/mlflow.db, or the http(s) address of an `mlflow server`"
_ENVIRONMENT = {
    # A producer's process tells no third party that it runs.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Neither bars nor links on the terminal: the commands have their own.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A server that is gone is given up after a quarter of a minute. MLflow's own defaults amount to several.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""MLflow's own settings, by its own switches. Whoever has set one of them keeps what they set."""


def store_uri(uri: str) -> str:
    """The URI in the form in which it means the same in every process. Raises `ConfigError` for a store of no use."""
    scheme = urlsplit(uri).scheme
    if scheme in {"http", "https"}:
        return uri.rstrip("/")
    if scheme == "sqlite":
        path = uri.removeprefix("sqlite:///")
        if not uri.startswith("sqlite:///") or path in {"", ":memory:"} or path.startswith("?"):
            raise ConfigError(f"tracking URI {uri!r} names no file, so nothing would be kept: {_ADVICE}")
        return f"sqlite:///{Path(path).absolute()}"
    if scheme.partition("+")[0] in _DATABASE_PORTS:
        return uri
    if scheme in {"", "file"}:
        raise ConfigError(f"tracking URI {uri!r} is a folder, and MLflow keeps no runs in folders any more: {_ADVICE}")
    raise ConfigError(f"tracking URI {uri!r} is of no known kind: {_ADVICE}")


def sqlite_path(uri: str) -> Path | None:
    """The file behind a SQLite URI; None for any other."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def masked(uri: str) -> str:
    """The URI without its password, for messages."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


def check_reachable(uri: str, *, timeout_s: float = _TIMEOUT_S) -> None:
    """Raise `UnavailableError` within seconds, where MLflow would try for minutes, unless the store answers.

    Creates the folder of a SQLite file.
    """
    uri = store_uri(uri)
    scheme = urlsplit(uri).scheme
    if scheme == "sqlite":
        _check_sqlite(Path(uri.removeprefix("sqlite:///")), timeout_s)
    elif scheme in {"http", "https"}:
        _check_server(uri, timeout_s)
    else:
        _check_database(uri, timeout_s)


def open_client(uri: str) -> MlflowClient:
    """A client of tracking and registry behind one URI. Creates a SQLite file with its tables.

    Raises `ConfigError` or `UnavailableError`, within seconds.
    """
    uri = store_uri(uri)
    check_reachable(uri)
    _prepare_environment()
    from mlflow import MlflowClient

    # Two lines at INFO about tables that nobody asked for.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    with _alone_with(sqlite_path(uri)), store_errors(uri), warnings.catch_warnings():
        # MLflow's models use a loader strategy that SQLAlchemy 2.1 deprecates.
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy", category=DeprecationWarning)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
    return client


def open_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The id of the experiment with that name, created if there is none.

    With SQLite its artefacts go to a folder beside the file, and not to the working directory.
    """
    from mlflow.exceptions import MlflowException

    database = sqlite_path(store_uri(uri))
    folder = None if database is None else str(database.parent / "artifacts" / re.sub(r"[^\w.-]", "_", name))
    with store_errors(uri):
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name, artifact_location=folder))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(name)  # another process was quicker
    if experiment is None or experiment.lifecycle_stage != "active":
        raise UnavailableError(
            f"the MLflow experiment {name!r} at {masked(uri)} has been deleted: restore it, or use another catalog name"
        )
    return str(experiment.experiment_id)


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn whatever MLflow raises into `UnavailableError`. Our own errors pass."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        raise UnavailableError(f"MLflow at {masked(uri)} failed: {_first_line(error)}") from error


def _prepare_environment() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def _alone_with(database: Path | None) -> Iterator[None]:
    """MLflow makes a file's tables when it is first opened; two processes that do so at a time break each other."""
    from filelock import FileLock, Timeout

    if database is None:
        yield
        return
    lock = FileLock(database.with_name(database.name + ".lock"))
    try:
        lock.acquire(timeout=60)
    except Timeout as error:
        raise UnavailableError(f"another process has been opening {database} for a minute: end it, or wait") from error
    try:
        yield
    finally:
        lock.release()


def _check_sqlite(database: Path, timeout_s: float) -> None:
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(database, timeout=timeout_s)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # only who may write gets this lock
            connection.rollback()
    except (OSError, sqlite3.Error) as error:
        raise UnavailableError(
            f"cannot use {database} for tracking: {error}. Choose another file with --tracking-uri"
        ) from error


def _check_server(uri: str, timeout_s: float) -> None:
    """As the client will ask: with its credentials, certificates and proxies."""
    _prepare_environment()
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    advice = "start it (mlflow server ...), mend the address, or leave --tracking-uri out to use a local file"
    try:
        credentials = get_default_host_creds(uri)
        response = http_request(credentials, "/health", "GET", timeout=timeout_s, max_retries=0, raise_on_status=False)
    except (MlflowException, OSError) as error:  # what requests raises is an OSError
        raise UnavailableError(f"no tracking server answers at {masked(uri)}: {advice}") from error
    if response.status_code in {401, 403}:
        raise UnavailableError(
            f"the tracking server at {masked(uri)} refuses us ({response.status_code} {response.text.strip()[:80]}): "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or let it allow us"
        )
    if response.status_code != 200 or response.text.strip() != "OK":
        raise UnavailableError(
            f"what answers at {masked(uri)} is no healthy MLflow server (/health: {response.status_code}): {advice}"
        )


def _check_database(uri: str, timeout_s: float) -> None:
    from sqlalchemy import create_engine, make_url
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    try:
        url = make_url(uri)
        port = url.port or _DATABASE_PORTS[url.get_backend_name()]
        socket.create_connection((url.host or "localhost", port), timeout=timeout_s).close()
        create_engine(url, poolclass=NullPool).connect().close()
    except (OSError, ImportError, SQLAlchemyError) as error:
        raise UnavailableError(f"cannot use the database {masked(uri)} for tracking: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
