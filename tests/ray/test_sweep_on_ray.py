"""A sweep on Ray Tune: side by side, on nodes that share no disk, and stopped early."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import ROOT

from orchestrator.privacy.ledger import Ledger

FLAGS = [
    *("--image-size", "16", "--network.head", "linear", "--device", "cpu", "--split-index", "5"),
    *("--epochs", "2", "--encoder.epochs", "1", "--batch-size", "32", "--encoder.batch-size", "32"),
    *("--dp.accountant", "rdp", "--private", "who", "--tasks", "pose", "--objectives", "utility,epsilon"),
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    who, pose = rng.integers(0, 3, 90), rng.integers(0, 2, 90)
    images = []
    for w, p in zip(who, pose, strict=True):
        pixels = rng.integers(0, 30, (16, 16, 3)).astype(np.uint8)
        pixels[4 * w : 4 * w + 4, 8 * p : 8 * p + 6] = 200
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append(buffer.getvalue())
    table = {"image": images, "who": [f"person{w}" for w in who], "pose": [("left", "right")[p] for p in pose]}
    pq.write_table(pa.table(table), tmp_path / "faces.parquet")
    return f"parquet:{tmp_path / 'faces.parquet'}"


def on_two_nodes(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_AUTH_TOKEN", None)
    folder.mkdir()
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ray" / "two_nodes.py"), str(folder), "--", *FLAGS, *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_sweep_on_two_nodes_without_a_common_disk_gives_what_one_process_gives(tmp_path, data):
    space = ["--data", data, "--omega", "0,1", "--epsilon", "2,none", "--dp.noise-seed", "3"]
    nodes, out = tmp_path / "nodes", tmp_path / "out"
    done = on_two_nodes(nodes, *space, "--storage", f"file://{tmp_path}/bucket", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert not (nodes / "trespasses").exists(), (nodes / "trespasses").read_text()
    found = json.loads((out / "sweep.json").read_text())
    assert [t["status"] for t in found["trials"]] == ["done"] * 4 and found["encoders_trained"] == 2
    assert len(list((nodes / "scratch" / "features").glob("*.npy"))) == 2, "one file for each encoder"
    assert not (nodes / "home" / "features").exists()
    (run,) = (tmp_path / "bucket" / "sweeps").iterdir()
    assert len(list((run / "trials").iterdir())) == 4 and (run / "sweep.json").exists()
    with Ledger(nodes / "home" / "ledger.db") as ledger:
        (entry,) = ledger.accounts()[0].entries
    assert entry.released and entry.charged == entry.mechanism.steps, "every step of the worker was charged here"

    here = subprocess.run(
        [sys.executable, "pipelines/sweep.py", *FLAGS, *space, "--engine", "process", "--out", str(tmp_path / "here")],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "METAMORPHOSIS_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert here.returncode == 0, here.stderr
    alone = json.loads((tmp_path / "here" / "sweep.json").read_text())
    assert {t["id"]: t["validation"] for t in alone["trials"]} == {t["id"]: t["validation"] for t in found["trials"]}


@pytest.mark.slow
def test_a_path_is_refused_on_two_nodes_with_what_to_use_instead(tmp_path, data):
    done = on_two_nodes(tmp_path / "nodes", "--data", data, "--omega", "0,1", "--storage", str(tmp_path / "here"))
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()[-1]
    assert "has 2 nodes" in said and "s3://" in said and "file:///" in said
    assert not list(tmp_path.glob("here/sweeps/*/trials/*"))


@pytest.mark.slow
def test_asha_and_optuna_run_to_their_end_and_what_was_stopped_is_said(tmp_path, data):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "METAMORPHOSIS_HOME": str(tmp_path / "home")}
    flags = [*FLAGS, "--data", data, "--omega", "loguniform:1e-4:1e4", "--search", "optuna", "--trials", "4", "--asha"]
    done = subprocess.run(
        [sys.executable, "pipelines/sweep.py", *flags, "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=550, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Number of trials" not in done.stdout, "Tune prints nothing of its own"
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert len({t["id"] for t in found["trials"]}) == 4 and found["encoders_trained"] == 1
    for trial in found["trials"]:
        assert trial["status"] in ("done", "stopped")
        assert (trial["status"] == "stopped") == (not trial["values"])
        assert len(trial["curve"]) == 2 or trial["status"] == "stopped"
