"""Runs of the kill matrix: a command started, struck and resumed, and what it left behind in the end."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError
from urllib.request import urlopen

from matrix_cells import ADDED, COMMANDS, Cell

ROOT: Final = Path(__file__).resolve().parents[2]
_START_S: Final = 900.0
"""How long one start of a command may take before the cell counts as hanging."""


@dataclass(frozen=True, kw_only=True)
class End:
    """What a run left behind."""

    losses: Mapping[str, float]
    """Task to the published network's mean loss on the training subset."""
    metrics: Mapping[str, Mapping[str, float]]
    weights: Mapping[str, Any] = field(repr=False)
    """Part to its weights, flat."""
    epsilon: Mapping[str, float | None]
    """Of each guarantee."""
    ledger_epsilon: float
    charged: Mapping[str, tuple[int, int, int]]
    """Part to (steps charged, steps held, reservations)."""


class BrokenError(Exception):
    """A run that did not go as its cell says."""


class Matrix:
    """Runs cells one after the other in one folder: ``home`` is the storage of each of them in turn."""

    def __init__(self, folder: Path, *, keep: bool) -> None:
        self.folder, self.keep = folder, keep
        self.home, self.faults = folder / "home", folder / "faults"
        self.faults.mkdir(parents=True, exist_ok=True)
        (folder / "kept").mkdir(exist_ok=True)
        shutil.copy(Path(__file__).with_name("faults.py"), self.faults / "sitecustomize.py")
        self._ends: dict[str, End] = {}
        self._cluster: subprocess.Popen[str] | None = None
        self._address, self._read = "", 0
        self._data: Any = None
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH"}},
            "METAMORPHOSIS_HOME": str(self.home),
            "PYTHONPATH": f"{self.faults}{os.pathsep}{ROOT}",
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # Whatever else runs on the machine, Ray neither kills a worker that the cell does not kill, nor starves it.
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_worker_niceness": "0",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, cell: Cell) -> End:
        """The end of a cell. Raises `BrokenError` if it went otherwise than the cell says."""
        self._begin(cell)
        try:
            with self._server(cell) as server, self._tenant(cell) as tenant:
                for starts, wanted in enumerate(cell.ends):
                    self._expect(cell, wanted, resume=starts > 0, server=server, tenant=tenant)
                if self.struck() != len(cell.strikes):
                    raise BrokenError(f"only {self.struck()} of {len(cell.strikes)} strikes happened")
                if tenant is not None:
                    tenant.wait()
                return self.read(server.uri if server is not None else None)
        finally:
            self._put_away(cell.name)

    def reference(self, command: str, workers: int = 1) -> End:
        """The end of the undisturbed run, which is run unless the folder has it. Raises `BrokenError` if it fails."""
        cell = Cell(who="undisturbed", when="", strikes=(), command=command, workers=workers)
        if cell.reference not in self._ends:
            if command != "train":
                self.reference("train")
            if (kept := self.folder / "kept" / cell.reference).exists():
                shutil.rmtree(self.home, ignore_errors=True)
                shutil.copytree(kept, self.home)
            else:
                self._begin(cell)
                self._expect(cell, "done", resume=False, server=None, tenant=None)
            self._ends[cell.reference] = self.read(None)
            self._put_away(cell.reference, keep=True)
        return self._ends[cell.reference]

    def close(self) -> None:
        """End the cluster."""
        if self._cluster is not None:
            assert self._cluster.stdin is not None
            assert self._cluster.stdout is not None
            self._cluster.stdin.close()
            self._cluster.wait(timeout=120)
            self._cluster.stdout.close()

    def _begin(self, cell: Cell) -> None:
        for path in (*self.faults.glob("struck-*"), self.faults / "server-up", self.faults / "plan.json"):
            path.unlink(missing_ok=True)
        (self.faults / "plan.json").write_text(json.dumps(cell.strikes))
        shutil.rmtree(self.home, ignore_errors=True)
        if cell.command == "train":
            self.home.mkdir()
            shutil.copy(self._empty_store(), self.home / "mlflow.db")
        else:
            shutil.copytree(self.folder / "kept" / "train", self.home)

    def _empty_store(self) -> Path:
        """An MLflow file with its tables: making them takes MLflow seconds."""
        path = self.folder / "kept" / "mlflow.db"
        if not path.exists():
            from orchestrator.mlflow_store import open_client

            open_client(f"sqlite:///{path}")
        return path

    def _put_away(self, name: str, *, keep: bool = False) -> None:
        """The home, under the cell's name or to nowhere. While it is a home it must have the same path as all others:
        MLflow keeps absolute ones."""
        if keep or self.keep:
            shutil.rmtree(self.folder / "kept" / name, ignore_errors=True)
            self.home.rename(self.folder / "kept" / name)
        else:
            shutil.rmtree(self.home, ignore_errors=True)

    def struck(self) -> int:
        """How many strikes happened in the run that is going on, or was the last."""
        return len(list(self.faults.glob("struck-*")))

    def _expect(self, cell: Cell, wanted: str, *, resume: bool, server: Server | None, tenant: Tenant | None) -> None:
        """One start of the command, to its end. Raises `BrokenError` unless it ends as it should."""
        code, out = self._start(cell, resume=resume, server=server, tenant=tenant)
        got = {0: "done", -signal.SIGKILL: "killed", 1: "refused", 2: "refused"}.get(code, f"status {code}")
        said = next((line for line in reversed(out.splitlines()) if line.strip()), "")
        if got != wanted:
            raise BrokenError(f"start {'with --resume ' if resume else ''}ended {got}, not {wanted}: {said[:300]}")
        if got == "refused" and (not said.startswith("error: ") or "Traceback" in out or "fault in the program" in out):
            raise BrokenError(f"an error without a readable line: {said[:300]}")

    def _start(self, cell: Cell, *, resume: bool, server: Server | None, tenant: Tenant | None) -> tuple[int, str]:
        script, *flags = COMMANDS[cell.command]
        flags += ["--encoder-workers", str(cell.workers)] if cell.command == "train" else []
        flags += ["--engine", "process"] if cell.engine == "process" else []
        flags += ["--address", self._joined()] if cell.engine == "joined" else []
        flags += ["--tracking-uri", server.uri] if server is not None else []
        flags += ["--remote", tenant.address] if tenant is not None else []
        log = self.home / "command.log"
        with log.open("a") as file:
            file.write(f"$ {' '.join([script, *flags])}{' --resume' if resume else ''}\n")
            at = file.tell()
            run = subprocess.Popen(
                [sys.executable, script, *flags, *(["--resume"] if resume else [])],
                cwd=ROOT,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            (self.faults / "driver").write_text(str(run.pid))
            deadline = time.monotonic() + _START_S
            while run.poll() is None:
                if cell.server == "back" and server is not None and server.is_dead():
                    server.start()
                    (self.faults / "server-up").touch()
                if tenant is not None:
                    tenant.keep_alive()
                if time.monotonic() > deadline:
                    run.kill()
                    run.wait()
                    raise BrokenError(f"did not end within {_START_S:.0f} s")
                time.sleep(0.1)
        if cell.server == "away" and server is not None and server.is_dead():
            server.start()
        with log.open() as file:
            file.seek(at)
            return run.returncode, file.read()

    def _joined(self) -> str:
        """Address of the cluster that outlives the commands."""
        if self._cluster is None:
            self._cluster = subprocess.Popen(
                [sys.executable, "-c", _CLUSTER],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            assert self._cluster.stdout is not None
            for line in self._cluster.stdout:
                if line.startswith("address "):
                    self._address = line.split()[1]
                    break
            else:
                raise BrokenError("the Ray cluster did not start")
        return self._address

    @contextmanager
    def _server(self, cell: Cell) -> Iterator[Server | None]:
        if not cell.server:
            yield None
            return
        server = Server(self.home, pid_file=self.faults / "server", environment=self.environment)
        server.start()
        try:
            yield server
        finally:
            server.kill()

    @contextmanager
    def _tenant(self, cell: Cell) -> Iterator[Tenant | None]:
        if not cell.elsewhere:
            yield None
            return
        tenant = Tenant(self.home, environment=self.environment)
        try:
            yield tenant
        finally:
            tenant.kill()

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, uri: str | None) -> End:
        """What the run that just ended has published, spent and learned. Raises `BrokenError` if that is not whole."""
        import torch

        from orchestrator.catalog import Catalog
        from orchestrator.privacy.ledger import Ledger

        catalog = Catalog(uri or f"sqlite:///{self._copied_store()}", "digits")
        if catalog.encoder_versions() != ["1"]:
            raise BrokenError(f"encoders {catalog.encoder_versions()} are published, not one")
        encoder, e_weights = catalog.encoder("1")
        tasks = catalog.tasks("1")
        weights: dict[str, Any] = {"encoder": e_weights}
        for task in tasks:
            _, weights[f"{task}: module"], head = catalog.load_task("1", task)
            weights[f"{task}: head"] = Tenant.head(self.home)[0] if head is None else head
        with Ledger(self.home / "ledger.db") as ledger:
            (account,) = ledger.accounts()
        assert account.delta is not None
        left = [path.name for path in (self.home / "runs").glob("*")]
        if left:
            raise BrokenError(f"the run left {', '.join(left)} behind")
        return End(
            losses=self._losses(encoder, tasks, weights),
            metrics={task: dict(record.metrics) for task, record in tasks.items()},
            weights={
                part: torch.cat([state[name].reshape(-1).double() for name in sorted(state)])
                for part, state in weights.items()
            },
            epsilon={
                "encoder": encoder.guarantee.get("epsilon"),
                **{task: record.guarantee.get("epsilon") for task, record in tasks.items()},
            },
            ledger_epsilon=account.spent(account.delta),
            charged=_charged(account.entries),
        )

    def _copied_store(self) -> Path:
        """A copy of the home's MLflow file that no other has the name of: MLflow keeps files open by name."""
        self._read += 1
        copy = self.folder / "kept" / f"read-{self._read}.db"
        shutil.copy(self.home / "mlflow.db", copy)
        return copy

    def _losses(self, encoder: Any, tasks: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, float]:
        import torch

        from orchestrator.consumer import rebuild_head
        from orchestrator.models.modules import ModuleConfig, build_module
        from orchestrator.runs.observer import SilentObserver
        from orchestrator.runs.opening import open_data
        from orchestrator.runs.publishing import network_of, settings_of
        from tasks.transforms import to_tensor

        if self._data is None:
            self._data = open_data(settings_of(encoder, None), SilentObserver())
        table, rows = self._data.table, self._data.splits.subset("train")
        torch.set_num_threads(1)
        network = network_of(encoder, head=None, module=None).build_encoder(seed=0).eval()
        network.load_state_dict(weights["encoder"])
        losses = {}
        with torch.no_grad():
            u = network(to_tensor(table.images[rows], table.normalisation))
            for task, record in tasks.items():
                module = build_module(ModuleConfig.from_json(dict(record.module_config)), seed=0).eval()
                module.load_state_dict(weights[f"{task}: module"])
                config = record.head_config or Tenant.head(self.home)[1]
                logits = rebuild_head(dict(config), weights[f"{task}: head"])(module(u))
                targets = torch.from_numpy(table.task_labels(task)[rows])
                losses[task] = float(torch.nn.functional.cross_entropy(logits.double(), targets))
        return losses


_CLUSTER: Final = """
import sys, ray
ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


class Server:
    """A tracking server on the storage folder's own store. It may be killed and started again at the same address."""

    def __init__(self, home: Path, *, pid_file: Path, environment: Mapping[str, str]) -> None:
        self._port = _free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._home, self._pid_file = home, pid_file
        self._environment = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self._home / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)),
                    *("--backend-store-uri", f"sqlite:///{self._home}/mlflow.db", "--workers", "1"),
                    *("--artifacts-destination", str(self._home / "served")),
                ],
                cwd=self._home,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._pid_file.write_text(str(self._process.pid))
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            with suppress(URLError, OSError), urlopen(f"{self.uri}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)
        raise BrokenError("the tracking server did not start")

    def is_dead(self) -> bool:
        """Whether somebody killed it."""
        return self._process is not None and self._process.poll() is not None

    def kill(self) -> None:
        """End it and its workers."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Tenant:
    """A tenant's own process, `serve.edge.train`, under somebody who starts it again whenever it is killed."""

    def __init__(self, home: Path, *, environment: Mapping[str, str]) -> None:
        from serve.tenants.gate import Places
        from serve.tenants.registry import Registry

        self.address = f"127.0.0.1:{_free_port()}"
        self._folder, self._environment = home / "tenant", environment
        self._folder.mkdir()
        with Registry(Places.in_storage(home).registry) as registry:
            token = registry.add("acme", role="tenant").token.text
            registry.grant("acme", ADDED)
        (self._folder / "token").touch(mode=0o600)
        (self._folder / "token").write_text(token)
        self._process = self._started()

    def keep_alive(self) -> None:
        """Start it again if it was killed."""
        if self._process.poll() == -signal.SIGKILL:
            self._process = self._started()

    def wait(self) -> None:
        """Until it has its head. Raises `BrokenError` if it ends without, or not at all."""
        deadline = time.monotonic() + 120
        while self._process.poll() in {None, -signal.SIGKILL} and time.monotonic() < deadline:
            self.keep_alive()
            time.sleep(0.1)
        if self._process.poll() != 0:
            said = (self._folder / "log").read_text().strip().rpartition("\n")[2]
            raise BrokenError(f"the tenant ended with status {self._process.poll()}: {said[:300]}")

    def kill(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()
        self._process.wait()

    @staticmethod
    def head(home: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """(weights, configuration) that it ended with. Raises `CheckpointError` if there is none."""
        from orchestrator.checkpoint import load_weights

        return load_weights(home / "tenant" / "heads" / ADDED / "weights.safetensors")

    def _started(self) -> subprocess.Popen[bytes]:
        flags = ["--task", ADDED, "--token-file", "token", "--key-file", "key", "--device", "cpu", "--threads", "1"]
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "serve.edge.train", "--url", f"http://{self.address}", *flags],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
            )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _charged(entries: Sequence[Any]) -> dict[str, tuple[int, int, int]]:
    charged: dict[str, tuple[int, int, int]] = {}
    for entry in entries:
        steps, held, n = charged.get(entry.part, (0, 0, 0))
        charged[entry.part] = (steps + entry.charged, held + entry.held, n + 1)
    return charged
