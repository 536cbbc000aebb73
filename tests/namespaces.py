"""A network namespace behind a shaped link, made with iproute2: another machine, as far as TCP can tell. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from delayed_link import open_tun


class NoNamespaceError(Exception):
    """This machine has none, and why."""


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """A process in it reaches this machine at ``host``, and nothing else."""

    name: str
    host: str
    mbit: float
    delay_ms: float
    """Each way."""
    carrier: Literal["netem", "process"]
    """The kernel, or a process with two TUN devices where it has no netem."""

    def command(self, argv: Sequence[str]) -> list[str]:
        """What runs that in it."""
        return ["ip", "netns", "exec", self.name, *argv]


@contextmanager
def shaped_namespace(*, mbit: float, delay_ms: float) -> Iterator[Namespace]:
    """While the block runs. Rate and delay hold in each direction: by the kernel's netem, or by a process without it.

    Raises `NoNamespaceError`.
    """
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NoNamespaceError(f"there is no {tool}: install iproute2")
    name, number = f"mm{os.getpid()}", os.getpid() % 60
    here, there, subnet = f"mh{os.getpid()}", f"mt{os.getpid()}", f"10.213.77.{4 * number}"
    host, guest = (f"{subnet.rpartition('.')[0]}.{4 * number + i}" for i in (1, 2))
    _run("ip", "netns", "add", name)
    inside = ("ip", "netns", "exec", name)
    with ExitStack() as stack:
        stack.callback(_run, "ip", "netns", "delete", name)  # and the end of the link in it
        carrier = _link(stack, inside, here, there, mbit, delay_ms)
        for within, device, address in (((), here, host), (inside, there, guest)):
            _run(*within, "ip", "address", "add", f"{address}/30", "dev", device)
            _run(*within, "ip", "link", "set", device, "up")
        _run(*inside, "ip", "link", "set", "lo", "up")
        yield Namespace(name=name, host=host, mbit=mbit, delay_ms=delay_ms, carrier=carrier)


def _link(
    stack: ExitStack, inside: Sequence[str], here: str, there: str, mbit: float, delay_ms: float
) -> Literal["netem", "process"]:
    """Two ends, and who carries between them."""
    _run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", inside[-1])
    try:
        for within, device in (((), here), (inside, there)):
            _shape(within, device, mbit, delay_ms)
    except NoNamespaceError:
        _run("ip", "link", "delete", here)
    else:
        return "netem"
    try:
        end = open_tun(here)
    except OSError as error:
        raise NoNamespaceError(f"neither netem nor /dev/net/tun: {error}") from None
    stack.callback(os.close, end)
    argv = [*inside, sys.executable, str(Path(__file__).with_name("delayed_link.py"))]
    process = subprocess.Popen([*argv, str(end), there, f"{mbit:g}", f"{delay_ms:g}"], pass_fds=(end,))
    stack.callback(process.wait)
    stack.callback(process.kill)
    deadline = time.monotonic() + 10
    while not _exists(inside, there):
        if process.poll() is not None or time.monotonic() > deadline:
            raise NoNamespaceError("no TUN device in the namespace")
        time.sleep(0.02)
    return "process"


def _shape(inside: Sequence[str], device: str, mbit: float, delay_ms: float) -> None:
    start = (*inside, "tc", "qdisc", "add", "dev", device, "root")
    _run(*start, "netem", "delay", f"{delay_ms:g}ms", "rate", f"{mbit:g}mbit", "limit", "10000")


def _exists(inside: Sequence[str], device: str) -> bool:
    return subprocess.run([*inside, "ip", "link", "show", device], capture_output=True, check=False).returncode == 0


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoNamespaceError(f"{' '.join(argv)}: {done.stderr.strip()}")
