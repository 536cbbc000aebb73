"""An operator who serves a storage folder with the commands that a user types, on a cluster of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
from http_server import free_port
from tiny import ROOT

from serve.deployment.head import HeadFile


class Operator:
    """Types commands, and looks at processes."""

    def __init__(self, home: Path) -> None:
        self.home, self.port, self.metrics_port = home, free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        ports = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            **{name: str(free_port()) for name in ports},
            "PYTHONPATH": str(ROOT),
            "METAMORPHOSIS_HOME": str(home),
            "OMP_NUM_THREADS": "1",
        }

    def deploy(self, *flags: str, status: int = 0) -> str:
        """Run it, and return what it printed."""
        done = subprocess.run(
            [sys.executable, str(ROOT / "pipelines" / "deploy.py"), *flags],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout if status == 0 else done.stderr

    def replicas(self, task: str) -> set[int]:
        """Process ids of a task's replicas."""
        head = HeadFile(self.home / "serving").read()
        family = psutil.Process(head.pid).children(recursive=True)
        named = [p for p in family if p.status() != psutil.STATUS_ZOMBIE and p.cmdline()]
        return {p.pid for p in named if p.cmdline()[0].startswith(f"ray::ServeReplica:task-{task}:")}
