"""The producer's end of remote trainings: a small server in a thread of the session's process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import uvicorn

from orchestrator.consumer import ConsumerConfig
from orchestrator.errors import ConfigError, MetaMorphosisError, PartyLostError, UnavailableError
from orchestrator.wire import TaskOffer
from serve.remote.app import Admits, training_app
from serve.remote.consumer import RemoteConsumer
from serve.remote.exchange import Exchange

_START_S: Final = 10.0
_FAREWELL_S: Final = 30.0
"""How long a finished run waits for its tenants to hear what became of their tasks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where tenants find the session."""

    host: str
    port: int
    """0: any that is free."""
    certificate: Path | None = None
    """PEM, with its chain; None: plain HTTP, for a network of one's own or behind a proxy that has TLS."""
    key: Path | None = None

    @classmethod
    def parse(cls, address: str, *, certificate: Path | None = None, key: Path | None = None) -> Endpoint:
        """``HOST:PORT``. Raises `ConfigError`."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"{address!r} is no place to listen at: give HOST:PORT, for instance 0.0.0.0:8443")
        if (certificate is None) != (key is None):
            raise ConfigError("a certificate needs its key, and a key its certificate: give both or neither")
        for path in (certificate, key):
            if path is not None and not path.is_file():
                raise ConfigError(f"there is no file {path}")
        return cls(host=host.strip("[]"), port=int(port), certificate=certificate, key=key)


class Listener:
    """Serves the trainings of some tasks while it is open. A context manager.

    Every session of a run takes its consumers from `consumer`; the exchanges, and with them the tenants, outlive each.
    """

    def __init__(self, tasks: tuple[str, ...], endpoint: Endpoint, gate: Admits, *, patience_s: float) -> None:
        """Listens from now on, so that an address that cannot be had is refused before anything is trained."""
        self.exchanges = {task: Exchange(task, patience_s=patience_s) for task in tasks}
        self._socket = _bound(endpoint)
        config = uvicorn.Config(
            training_app(self.exchanges, gate),
            log_config=None,
            access_log=False,
            server_header=False,
            ssl_certfile=endpoint.certificate,
            ssl_keyfile=endpoint.key,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
            lifespan="off",
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            self._socket.close()
            raise ConfigError(f"cannot use the certificate or its key: {error}") from error
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="remote-training", daemon=True
        )
        scheme = "https" if endpoint.certificate is not None else "http"
        host, port = self._socket.getsockname()[:2]
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        """Where this machine reaches it."""

    def __enter__(self) -> Listener:
        self._thread.start()
        deadline = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise UnavailableError(f"the server of remote trainings did not start at {self.url}")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, MetaMorphosisError) and not isinstance(error, PartyLostError):
                self.tell(
                    {task: {"version": None, "reason": "the producer's session ended"} for task in self.exchanges}
                )
        finally:
            for exchange in self.exchanges.values():
                exchange.close()
            self._server.should_exit = True
            self._thread.join(timeout=_START_S)
            self._socket.close()

    def consumer(self, offer: TaskOffer, config: ConsumerConfig, *, run: str) -> RemoteConsumer:
        """The tenant of that task, for one session of the run of that name."""
        return RemoteConsumer(offer, config, self.exchanges[offer.spec.name], run=run)

    def tell(
        self, outcomes: Mapping[str, Mapping[str, Any]], *, run: str = "", wait_s: float = _FAREWELL_S
    ) -> list[str]:
        """Tell tenants what became of their tasks. Returns those that did not come to hear it in time.

        ``run``: as of `consumer`, so that a process that was not there finds what an earlier one has kept.
        """
        asked = {
            task: self.exchanges[task].end({**outcome, "run": run}, lambda _: None)
            for task, outcome in outcomes.items()
        }
        deadline = time.monotonic() + wait_s
        for task in list(asked):
            try:
                asked[task].future.result(timeout=max(0.0, deadline - time.monotonic()))
            except (TimeoutError, MetaMorphosisError):
                del asked[task]
        return sorted(set(outcomes) - set(asked))


def _bound(endpoint: Endpoint) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
        return socket.create_server((endpoint.host, endpoint.port), family=family)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen at {endpoint.host}:{endpoint.port} ({error.strerror or error}): choose another --remote"
        ) from error
