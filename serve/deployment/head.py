"""A Ray head node of one's own, which stays when the command ends: started, remembered, joined, and stopped alone.

    none -> starting -> running -> stopped

It listens on this machine only, behind a token of its own, in a folder of its own: other clusters of this machine are
neither joined nor stopped. A head that died (a reboot) counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import psutil

from orchestrator.checkpoint import write_atomically
from orchestrator.errors import CheckpointError, UnavailableError
from serve.deployment.environment import Entrance

_GRACE_S: Final = 15.0
_ROOT: Final = Path(__file__).parents[2]
"""Of the packages: processes of the cluster import them from here."""
_LOCAL: Final = "127.0.0.1"
_EVERY_PROCESS: Final = {
    "PYTHONWARNINGS": "ignore",
    # Ray's workers give way to everything else on the machine; those here answer requests.
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A head that was started here, or a cluster that was joined."""

    address: str
    entrance: Entrance
    pid: int | None = None
    """Of the process that keeps the head; None: the cluster is somebody else's."""
    created: float | None = None
    """When that process began, so that another one with its number is not taken for it."""

    def is_alive(self) -> bool:
        """Whether it still runs. A cluster that was joined is taken to."""
        if self.pid is None:
            return True
        try:
            process = psutil.Process(self.pid)
            return bool(process.create_time() == self.created) and _runs(process)
        except psutil.NoSuchProcess:
            return False


class HeadFile:
    """Which cluster the tasks of one storage folder are served on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """``serving`` in the storage folder."""

    @property
    def path(self) -> Path:
        """The file that remembers it."""
        return self.folder / "cluster.json"

    @property
    def scratch(self) -> Path:
        """For sockets and logs: short, as the name of a socket must be, and only for this user and storage folder."""
        known = hashlib.sha256(str(self.folder).encode()).hexdigest()[:10]
        return Path(tempfile.gettempdir()) / f"mm-{os.getuid()}-{known}"

    @property
    def token(self) -> Path:
        """The file of Ray's token: whoever can read it can run code in the cluster."""
        return self.folder / "ray.token"

    def read(self) -> Head | None:
        """The cluster that is remembered, if it is still there."""
        try:
            found = json.loads(self.path.read_text())
            head = Head(**{**found, "entrance": Entrance(**found["entrance"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path} is damaged ({error}): remove it, and stop Ray yourself") from error
        return head if head.is_alive() else None

    def write(self, head: Head) -> None:
        """Remember it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(asdict(head), indent=2) + "\n").encode())

    def forget(self) -> None:
        """There is none any more."""
        self.path.unlink(missing_ok=True)

    def authentication(self) -> dict[str, str]:
        """Environment of whoever joins or is started. The token is made where there is none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}

    def start(self, entrance: Entrance, environment: Mapping[str, str], *, metrics_port: int, timeout_s: float) -> Head:
        """Start a head node, wait until it answers, and remember it. Raises `UnavailableError`."""
        port = _free_port()
        scratch = self.scratch
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--node-ip-address={_LOCAL}", f"--port={port}", "--include-dashboard=false"),
            *(f"--temp-dir={scratch / 'ray'}", f"--metrics-export-port={metrics_port}"),
        ]
        log = self.folder / "head.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter
                command,
                env={**os.environ, **environment, **_EVERY_PROCESS, "PYTHONPATH": _python_path()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=scratch,
                start_new_session=True,
            )
        created = psutil.Process(process.pid).create_time()
        head = Head(address=f"{_LOCAL}:{port}", entrance=entrance, pid=process.pid, created=created)
        self.write(head)
        deadline = time.monotonic() + timeout_s
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                self.stop(head)
                raise UnavailableError(f"Ray's head node did not start within {timeout_s:g} s: see {log}")
            time.sleep(0.2)
        return head

    def stop(self, head: Head) -> None:
        """End the head that was started here, and every process that it started; a joined cluster is left alone."""
        if head.pid is not None and head.is_alive():
            family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGTERM)
            deadline = time.monotonic() + _GRACE_S
            while (alive := [process for process in family if _runs(process)]) and time.monotonic() < deadline:
                time.sleep(0.1)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.forget()


def _runs(process: psutil.Process) -> bool:
    """Whether it does; one that has ended and was not waited for does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _python_path() -> str:
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOCAL, 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((_LOCAL, port)) == 0
