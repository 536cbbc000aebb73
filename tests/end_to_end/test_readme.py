"""The commands of the README and of the results are those of the program."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from orchestrator.settings.add_task import AddTaskSettings
from orchestrator.settings.audit import AuditSettings
from orchestrator.settings.evaluate import EvaluateSettings
from orchestrator.settings.export_head import ExportHeadSettings
from orchestrator.settings.ledger import LedgerSettings
from orchestrator.settings.train import TrainSettings
from orchestrator.sweep.settings import SweepSettings
from pipelines.command import parse
from serve.settings import DeploySettings
from serve.tenants.label_settings import LabelsSettings
from serve.tenants.settings import TenantsSettings

CLASSES = {
    "train": TrainSettings,
    "add_task": AddTaskSettings,
    "evaluate": EvaluateSettings,
    "ledger": LedgerSettings,
    "audit": AuditSettings,
    "export_head": ExportHeadSettings,
    "sweep": SweepSettings,
    "deploy": DeploySettings,
    "tenants": TenantsSettings,
    "labels": LabelsSettings,
}
DOCUMENTS = ("README.md", "docs/results.md", "docs/sweeps.md", "docs/serving.md", "docs/tenants.md", "docs/edge.md")


def commands(document: str = "README.md") -> list[str]:
    """Every line of every shell block, continuation lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in text.splitlines() if line.strip()]


def pipeline_commands(document: str = "README.md") -> list[str]:
    return [found for line in commands(document) if (found := "".join(re.findall(r"python (pipelines/.*)$", line)))]


def test_the_readme_has_commands():
    assert len(pipeline_commands()) >= 7
    assert "make demo" in commands()


@pytest.mark.parametrize("command", [found for document in DOCUMENTS for found in pipeline_commands(document)])
def test_every_flag_in_the_documents_exists(command):
    script, *flags = shlex.split(command.replace(" HEX ", f" {64 * 'a'} "))
    name = Path(script).stem
    assert (ROOT / script).exists()
    parse(CLASSES[name], flags, prog=script, presets=name in {"train", "sweep"})


def test_every_make_target_in_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_demo_is_the_readmes_three_commands():
    demo = re.search(r"^demo: install\n(.*?)\n\n", (ROOT / "Makefile").read_text(), re.M | re.S).group(1)
    in_makefile = re.findall(r"python (pipelines/.*)", demo)
    assert in_makefile == pipeline_commands()[:3]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demos_commands_run_as_written(tmp_path):
    environment = {**os.environ, "METAMORPHOSIS_HOME": str(tmp_path)}
    environment.pop("RAY_ADDRESS", None)
    for command in pipeline_commands()[:3]:
        done = subprocess.run(
            [sys.executable, *shlex.split(command)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "excess" in done.stdout
    (report,) = tmp_path.glob("evaluations/*/report.html")
    assert str(report) in done.stdout
    assert (report.parent / "figures" / "leakage.png").exists()
