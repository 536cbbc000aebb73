"""The README's way from a trained demo to a tenant's predictions, typed as it stands there."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from deployed import Operator
from tiny import ROOT

_PORT = 8000


def serving_block() -> list[str]:
    """The shell lines of the README's section on serving."""
    section = (ROOT / "README.md").read_text().split("\n## Serving\n")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.S).group(1)
    return [line.split("  #")[0].strip() for line in block.splitlines() if line.strip()]


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readmes_serving_commands_run_as_written(operator: Operator, tmp_path: Path):
    assert port_is_free(_PORT), f"the README's port {_PORT} is in use on this machine"
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    (folder / "demo").symlink_to(operator.home)
    environment = {**operator.environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    del environment["METAMORPHOSIS_HOME"]
    export, *commands = serving_block()
    told = {}
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", f"{export}; {command}"],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        told[" ".join(command.split()[:3])] = done.stdout
    assert f"http://127.0.0.1:{_PORT}/tasks/loop" in told["python pipelines/deploy.py up"]
    predictions = told["python -m serve.edge"].strip().splitlines()
    assert len(predictions) == 8, "one line an image that was published"
    assert port_is_free(_PORT), "deploy.py down --all leaves nothing running"
