"""A link of a rate and a delay between two network namespaces, for kernels whose tc has no netem: two TUN devices, and
a process that carries packets from one to the other, each no sooner than the link would.

``python delayed_link.py FD DEVICE MBIT DELAY_MS``, in the namespace of DEVICE; FD is an open TUN device of the other.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LIMIT = 10_000
"""Packets on their way; more are lost, as with ``netem limit``."""


def open_tun(device: str) -> int:
    """Its file descriptor; it comes into being where it is not there, and goes when all descriptors are closed."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError:
        os.close(fd)
        raise
    return fd


class Direction:
    """Packets one way: sent one after the other at the rate, and each on its way for the delay."""

    def __init__(self, mbit: float, delay_ms: float, send: Callable[[bytes], object]) -> None:
        self._seconds_per_byte, self._delay_s, self._send = 8 / (mbit * 1e6), delay_ms / 1e3, send
        self._free = 0.0
        self._underway: deque[tuple[float, bytes]] = deque()

    def put(self, packet: bytes, now: float) -> None:
        """It has come to this end of the link."""
        if len(self._underway) < _LIMIT:
            self._free = max(now, self._free) + len(packet) * self._seconds_per_byte
            self._underway.append((self._free + self._delay_s, packet))

    def deliver(self, now: float) -> float | None:
        """What has arrived; when the next one will."""
        while self._underway and self._underway[0][0] <= now:
            self._send(self._underway.popleft()[1])
        return self._underway[0][0] if self._underway else None


def carry(ends: tuple[int, int], *, mbit: float, delay_ms: float) -> None:
    """Until it is killed."""
    ways = {source: Direction(mbit, delay_ms, partial(_write, target)) for source, target in (ends, ends[::-1])}
    wait = None
    while True:
        readable, _, _ = select.select(ends, (), (), wait)
        for source in readable:
            for packet in _read_all(source):
                ways[source].put(packet, time.monotonic())
        now = time.monotonic()
        nexts = [at for way in ways.values() if (at := way.deliver(now)) is not None]
        wait = max(0.0, min(nexts) - time.monotonic()) if nexts else None


def _read_all(fd: int) -> list[bytes]:
    packets = []
    while len(packets) < 64:
        try:
            packets.append(os.read(fd, 65536))
        except BlockingIOError:
            break
    return packets


def _write(fd: int, packet: bytes) -> None:
    try:
        os.write(fd, packet)
    except OSError:  # the device is down: lost
        return


if __name__ == "__main__":
    given, name, rate, delay = sys.argv[1:]
    carry((int(given), open_tun(name)), mbit=float(rate), delay_ms=float(delay))
