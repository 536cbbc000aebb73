"""The layers hold, and what must not be in the tree is not."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

from tiny import ROOT

PACKAGES = ("orchestrator", "tasks", "pipelines", "serve")


def sources():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_imports_run_one_way():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_only_the_shells_import_ray():
    importing = {
        str(path.relative_to(ROOT))
        for path in sources()
        if re.search(r"^\s*(import|from) ray\b", path.read_text(), re.M)
    }
    assert importing <= {
        "orchestrator/actors.py",
        "orchestrator/cluster.py",
        "orchestrator/train_job.py",
        "orchestrator/evaluation/parallel.py",
        "orchestrator/sweep/tuning.py",
        "serve/app.py",
        "serve/front_app.py",
        "serve/metrics.py",
        "serve/operator/app.py",
        "serve/deployment/cluster.py",
        "serve/deployment/statuses.py",
    }


def test_nothing_that_crossed_a_boundary_is_unpickled():
    for path in sources():
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|cloudpickle|dill|joblib)\b", text, re.M), path
        assert not re.search(r"(?<!safetensors\.)torch\.load\(", text), path
        assert "allow_pickle=True" not in text, path


def test_no_command_hides_a_package():
    assert {path.stem for path in (ROOT / "pipelines").glob("*.py")} & set(PACKAGES) == set()


def test_the_base_install_is_light():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.split(r"[<>=\[]", requirement)[0] for requirement in project["dependencies"]}
    assert base == {"cryptography", "httpx", "numpy", "onnxruntime", "safetensors", "zstandard"}


def test_every_direct_dependency_is_pinned_by_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    for requirement in wanted:
        assert re.split(r"[<>=\[]", requirement)[0].lower().replace("_", "-") in pinned, requirement
