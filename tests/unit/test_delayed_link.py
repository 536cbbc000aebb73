"""The link of the benchmarks and tests that need a delay: that it is as slow as it says."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest
from delayed_link import Direction
from namespaces import NoNamespaceError, shaped_namespace


def test_packets_are_sent_one_after_the_other_and_arrive_after_the_delay():
    arrived: list[bytes] = []
    way = Direction(mbit=50, delay_ms=5, send=arrived.append)
    one, two = b"1" * 6250, b"2" * 6250  # a millisecond each
    way.put(one, 10.0)
    way.put(two, 10.0)
    assert way.deliver(10.0059) == pytest.approx(10.006) and arrived == []
    assert way.deliver(10.0061) == pytest.approx(10.007) and arrived == [one]
    assert way.deliver(10.0071) is None and arrived == [one, two]
    way.put(one, 11.0)
    assert way.deliver(11.0) == pytest.approx(11.006), "an idle link sends at once"


ECHO = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as there:
    while data := there.recv(65536):
        there.sendall(data)
"""


@pytest.mark.parametrize("force", ["whatever there is", "a process"])
def test_a_namespace_is_as_far_away_as_was_asked(force, monkeypatch):
    if force == "a process":
        monkeypatch.setattr("namespaces._shape", no_netem)
    try:
        with shaped_namespace(mbit=20, delay_ms=20) as namespace, socket.create_server((namespace.host, 0)) as server:
            port = server.getsockname()[1]
            argv = namespace.command([sys.executable, "-c", ECHO, namespace.host, str(port)])
            with subprocess.Popen(argv), server.accept()[0] as connection:
                started = time.monotonic()
                connection.sendall(b"x")
                assert connection.recv(1) == b"x"
                assert time.monotonic() - started >= 0.04
                started, left = time.monotonic(), 200_000
                connection.sendall(b"y" * left)
                while left:
                    left -= len(connection.recv(65536))
                assert time.monotonic() - started >= 0.04 + 200_000 * 8 / 20e6
    except NoNamespaceError as error:
        pytest.skip(str(error))


def no_netem(*_: object) -> None:
    raise NoNamespaceError("no netem")
