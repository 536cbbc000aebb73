"""A network namespace behind a shaped link, made with iproute2: another machine, as far as TCP can tell. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class NoNamespaceError(Exception):
    """This machine has none, and why."""


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """A process in it reaches this machine at ``host``, and nothing else."""

    name: str
    host: str
    mbit: float
    delay_ms: float
    """Each way; 0 where the kernel has no netem."""

    def command(self, argv: Sequence[str]) -> list[str]:
        """What runs that in it."""
        return ["ip", "netns", "exec", self.name, *argv]


@contextmanager
def shaped_namespace(*, mbit: float, delay_ms: float) -> Iterator[Namespace]:
    """While the block runs. Rate and delay hold in each direction; a kernel without netem gets the rate alone.

    Raises `NoNamespaceError`.
    """
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NoNamespaceError(f"there is no {tool}: install iproute2")
    name, number = f"mm{os.getpid()}", os.getpid() % 60
    here, there, subnet = f"mh{os.getpid()}", f"mt{os.getpid()}", f"10.213.77.{4 * number}"
    host, guest = (f"{subnet.rpartition('.')[0]}.{4 * number + i}" for i in (1, 2))
    _run("ip", "netns", "add", name)
    try:
        inside = ("ip", "netns", "exec", name)
        _run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        _run("ip", "address", "add", f"{host}/30", "dev", here)
        _run("ip", "link", "set", here, "up")
        _run(*inside, "ip", "address", "add", f"{guest}/30", "dev", there)
        for device in (there, "lo"):
            _run(*inside, "ip", "link", "set", device, "up")
        delays = {_shape((), here, mbit, delay_ms), _shape(inside, there, mbit, delay_ms)}
        yield Namespace(name=name, host=host, mbit=mbit, delay_ms=min(delays))
    finally:
        _run("ip", "netns", "delete", name)  # and both ends of the link with it


def _shape(inside: Sequence[str], device: str, mbit: float, delay_ms: float) -> float:
    """What the delay became."""
    start = (*inside, "tc", "qdisc", "add", "dev", device, "root")
    try:
        _run(*start, "netem", "delay", f"{delay_ms:g}ms", "rate", f"{mbit:g}mbit", "limit", "10000")
    except NoNamespaceError:
        _run(*start, "tbf", "rate", f"{mbit:g}mbit", "burst", "32kb", "latency", "400ms")
        return 0.0
    return delay_ms


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoNamespaceError(f"{' '.join(argv)}: {done.stderr.strip()}")
