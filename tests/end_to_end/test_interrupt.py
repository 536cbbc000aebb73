"""Ctrl-C in the middle of a run on Ray: the right exit status, nothing half-published, no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from tiny import ROOT

from orchestrator.catalog import Catalog

COMMAND = [
    *("pipelines/train.py", "--preset", "digits", "--image-size", "16", "--head", "linear", "--device", "cpu"),
    *("--threads", "1", "--epochs", "500"),
]
FROZEN = ["--encoder.epochs", "1"]
"""The encoder is published before the tasks are trained."""
JOINT = ["--algorithm", "task", "--epsilon", "None"]


@pytest.mark.parametrize(
    ("how", "flags", "published"),
    [(signal.SIGINT, FROZEN, ["1"]), (signal.SIGTERM, JOINT, [])],
    ids=["ctrl-c", "ray job stop"],
)
def test_an_interrupted_run_leaves_nothing_half_done(tmp_path, how, flags, published):
    environment = {**os.environ, "METAMORPHOSIS_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    with subprocess.Popen(
        [sys.executable, *COMMAND, *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that started the tests in the background has them, and what they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
    ) as run:
        assert run.stdout is not None
        phase_two = False
        for line in run.stdout:
            phase_two = phase_two or "phase 2" in line
            if phase_two and "epoch" in line:
                break
        started = psutil.Process(run.pid).children(recursive=True)
        assert any("raylet" in process.name() for process in started)
        run.send_signal(how)
        _, err = run.communicate(timeout=120)
    assert run.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(process.is_running() for process in started):
        time.sleep(0.2)
    assert [process for process in started if process.is_running()] == []
    catalog = Catalog(f"sqlite:///{tmp_path}/mlflow.db", "digits")
    assert catalog.encoder_versions() == published
    assert all(catalog.tasks(version) == {} for version in published)
