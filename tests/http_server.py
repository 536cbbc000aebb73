"""An ASGI app on uvicorn in a thread, requests to it byte by byte, and a port for a server of one's own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn


def free_port(host: str = "127.0.0.1") -> int:
    """That nobody listens at, for now."""
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def on_uvicorn(app: Any, **options: Any) -> Iterator[tuple[str, int]]:
    """(host, port) at which it listens."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1, **options)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "uvicorn did not start"
            time.sleep(0.01)
        yield listening.getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()


@dataclass(frozen=True, slots=True)
class RawResponse:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes


class RawConnection:
    """One connection on which anything can be written. A context manager; connects again where it was closed."""

    def __init__(self, host: str, port: int, *, timeout_s: float = 30.0) -> None:
        self._place, self._timeout_s = (host, port), timeout_s
        self._socket: socket.socket | None = None

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ask(
        self, method: str, target: str, headers: list[tuple[str, str]] | None = None, body: bytes = b""
    ) -> RawResponse:
        """A request whose target and headers go out as they are."""
        lines = [f"{method} {target} HTTP/1.1", "Host: task", *(f"{name}: {value}" for name, value in headers or [])]
        if body or method == "POST":
            lines.append(f"Content-Length: {len(body)}")
        response = self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body, without_body=method == "HEAD")
        assert response is not None, f"no answer to {method} {target[:80]}"
        return response

    def send(self, data: bytes, *, without_body: bool = False, keep: bool = False) -> RawResponse | None:
        """These bytes; None where the server hung up, or says nothing, instead of answering.

        ``keep`` leaves the connection open then.
        """
        if self._socket is None:
            self._socket = socket.create_connection(self._place, timeout=self._timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._socket.sendall(data)
            response = self._receive(without_body)
        except (ConnectionError, TimeoutError):
            response = None
        if keep and response is None:
            return None
        if response is None or response.headers.get("connection", "").lower() == "close":
            self.close()
        return response

    def _receive(self, without_body: bool) -> RawResponse | None:
        assert self._socket is not None
        received = b""
        while b"\r\n\r\n" not in received:
            part = self._socket.recv(1 << 16)
            if not part:
                return None
            received += part
        head, _, body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if without_body:
            return RawResponse(int(first.split()[1]), headers, b"")
        chunked = headers.get("transfer-encoding") == "chunked"
        length = int(headers.get("content-length", "0"))
        while (not body.endswith(b"0\r\n\r\n")) if chunked else (len(body) < length):
            part = self._socket.recv(1 << 16)
            if not part:
                break
            body += part
        return RawResponse(int(first.split()[1]), headers, body)
