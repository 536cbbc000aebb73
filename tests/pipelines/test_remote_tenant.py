"""A task is added with a tenant in a process of its own, in an environment without Ray, MLflow or Opacus."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from environments import build_wheel, fresh_environment, run
from http_server import free_port
from namespaces import NoNamespaceError, shaped_namespace
from test_runs import catalog, run_train
from tiny import ROOT

from orchestrator.checkpoint import load_weights, weights_hash
from pipelines import add_task, export_head
from pipelines.command import execute
from serve.edge.head import Head
from serve.tenants.gate import Places
from serve.tenants.registry import Registry

BLOCKED = ("ray", "mlflow", "opacus", "fastapi", "uvicorn", "sklearn", "scipy", "pandas", "tyro", "cattrs", "pyarrow")
TENANT = f"""
import sys
from importlib.machinery import PathFinder
class WithoutThese(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {BLOCKED!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutThese
from serve.edge.train import main
status = main(sys.argv[1:])
assert not set(sys.modules) & set({BLOCKED!r})
raise SystemExit(status)
"""
ADD = ["--device", "cpu", "--threads", "1", "--epochs", "2", "--batch-size", "32", "--engine", "process"]


EPOCH = re.compile(r"glasses: loss ([\d.]+), validation accuracy ([\d.]+)")


EXPORTS = "orchestrator.settings.export_head:ExportHeadSettings"


def run_add(*flags: str) -> int:
    return execute("orchestrator.settings.add_task:AddTaskSettings", add_task.run, [*ADD, *flags], prog="add_task.py")


def start_tenant(folder: Path, url: str, token: str, command: list[str], **environment: str) -> subprocess.Popen[str]:
    """``command`` runs `serve.edge.train`."""
    folder.mkdir(exist_ok=True)
    (folder / "token").write_text(token)
    (folder / "token").chmod(0o600)
    arguments = ["--url", url, "--task", "glasses", "--token-file", "token", "--key-file", "key", "--plain-http"]
    return subprocess.Popen(
        [*command, *arguments, "--device", "cpu", "--threads", "1", "--patience-s", "120"],
        cwd=folder,
        env={"PATH": "/usr/bin:/usr/sbin:/bin:/sbin", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def token(home):
    registry = Registry(Places.in_storage(home).registry)
    issued = registry.add("acme", role="tenant")
    registry.grant("acme", "glasses")
    registry.close()
    return issued.token.text


def test_a_remote_tenant_ends_where_a_hosted_one_does_and_keeps_its_head(home, write_parquet, tmp_path, token, capsys):
    data = write_parquet()
    for _ in range(2):  # the same encoder twice, as each can have a task once
        assert (
            run_train("--data", data, "--private", "who", "--tasks", "pose", "--algorithm", "task", "--epsilon", "None")
            == 0
        )
    assert run_add("glasses", "--encoder-version", "1") == 0
    port = free_port()
    command = [sys.executable, "-c", TENANT]
    tenant = start_tenant(tmp_path / "tenant", f"http://127.0.0.1:{port}", token, command, PYTHONPATH=str(ROOT))
    remote_flags = ["--remote", f"127.0.0.1:{port}", "--remote-patience-s", "60", "--restarts", "0"]
    added = run_add("glasses", "--encoder-version", "2", *remote_flags)
    out, err = tenant.communicate(timeout=120)
    assert tenant.returncode == 0, err
    assert added == 0

    hosted, modules, head = catalog(home).load_task("1", "glasses")
    remote, remote_modules, none = catalog(home).load_task("2", "glasses")
    assert none is None
    assert remote.head_config is None
    assert remote.metrics == hosted.metrics
    assert weights_hash(remote_modules) == weights_hash(modules)
    own, _ = load_weights(tmp_path / "tenant" / "heads" / "glasses" / "weights.safetensors")
    for name, value in head.items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=1e-6)
    (path,) = (tmp_path / "tenant" / "heads" / "glasses").glob("*.onnx")
    assert Head.load(path).card.version.startswith(f"{remote.version}-")
    assert f"test: accuracy {remote.metrics['accuracy']:.3f}" in out

    # what the operator has is the hosted head, and not the other
    written = tmp_path / "head.onnx"
    flags = ["glasses", "--encoder-version", "1", "--out", str(written)]
    assert execute(EXPORTS, export_head.run, flags, prog="export_head.py") == 0
    z = np.random.default_rng(0).standard_normal((3, *Head.load(written).card.feature_shape)).astype(np.float32)
    np.testing.assert_allclose(Head.load(written).logits(z), Head.load(path).logits(z), atol=1e-5)
    capsys.readouterr()
    flags = ["glasses", "--encoder-version", "2", "--out", str(written)]
    assert execute(EXPORTS, export_head.run, flags, prog="export_head.py") == 2
    assert "keeps its head" in capsys.readouterr().err
    flags = ["who", "--encoder-version", "1", "--out", str(written)]
    assert execute(EXPORTS, export_head.run, flags, prog="export_head.py") == 2
    assert "does not leave the producer" in capsys.readouterr().err


def test_of_tasks_that_train_side_by_side_one_may_be_elsewhere(home, write_parquet, tmp_path, token, capsys):
    flags = ["--data", write_parquet(), "--private", "who", "--tasks", "pose,glasses"]
    flags += ["--algorithm", "task", "--epsilon", "None"]
    assert run_train(*flags) == 0
    port = free_port()
    command = [sys.executable, "-c", TENANT]
    tenant = start_tenant(tmp_path / "tenant", f"http://127.0.0.1:{port}", token, command, PYTHONPATH=str(ROOT))
    elsewhere = ["--remote", f"127.0.0.1:{port}", "--remote-tasks", "glasses", "--remote-patience-s", "60"]
    assert run_train(*flags, *elsewhere) == 0
    _, err = tenant.communicate(timeout=120)
    assert tenant.returncode == 0, err
    hosted, mixed = catalog(home).tasks("1"), catalog(home).tasks("2")
    assert mixed["glasses"].head_config is None
    assert mixed["pose"].head_config is not None
    assert {task: record.metrics for task, record in mixed.items()} == {t: r.metrics for t, r in hosted.items()}
    (path,) = (tmp_path / "tenant" / "heads" / "glasses").glob("*.onnx")
    assert Head.load(path).card.version.startswith(f"{mixed['glasses'].version}-")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--remote-tasks", "pose"], "give --remote HOST:PORT"),
        (["--remote", "127.0.0.1:0", "--remote-tasks", "nothing"], "no task of --tasks named 'nothing'; known: pose"),
        (["--remote", "127.0.0.1:0", "--phase", "encoder"], "trains no tenant's head"),
        (["--remote", "127.0.0.1:0", "--algorithm", "input", "--dp-mode", "whole", "--omega", "0"], "trains the heads"),
    ],
)
def test_a_tenant_elsewhere_that_has_nothing_to_train_is_refused(home, write_parquet, capsys, flags, told):
    assert run_train("--data", write_parquet(), "--private", "who", "--tasks", "pose", "--epsilon", "8", *flags) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_from_another_network_with_the_tenants_install_alone_the_losses_are_the_hosted_ones(
    home, write_parquet, tmp_path, token, capsys
):
    data = write_parquet()
    train = ("--data", data, "--private", "who", "--tasks", "pose", "--algorithm", "task", "--epsilon", "None")
    for _ in range(2):
        assert run_train(*train) == 0
    capsys.readouterr()
    assert run_add("glasses", "--encoder-version", "1") == 0
    hosted = EPOCH.findall(capsys.readouterr().out)
    python = fresh_environment(tmp_path / "environment", build_wheel(tmp_path), extra="tenant")
    assert run(python, "-c", "import torch, serve.remote.trainer", cwd=tmp_path).returncode == 0
    without = run(python, "-c", "import ray", cwd=tmp_path)
    assert "No module named 'ray'" in without.stderr
    try:
        with shaped_namespace(mbit=50, delay_ms=5) as namespace:
            port = free_port(namespace.host)
            command = namespace.command([str(python), "-m", "serve.edge.train"])
            tenant = start_tenant(tmp_path / "tenant", f"http://{namespace.host}:{port}", token, command)
            remote_flags = ["--remote", f"{namespace.host}:{port}", "--remote-patience-s", "120", "--restarts", "0"]
            added = run_add("glasses", "--encoder-version", "2", *remote_flags)
            out, err = tenant.communicate(timeout=120)
    except NoNamespaceError as error:
        pytest.skip(str(error))
    assert tenant.returncode == 0, err
    assert added == 0
    assert len(hosted) == 2
    assert EPOCH.findall(capsys.readouterr().out) == hosted
    theirs = re.findall(r"^loss ([\d.]+), validation", out, re.M)
    assert [f"{float(loss):.3f}" for loss in theirs] == [loss for loss, _ in hosted]
    assert catalog(home).load_task("2", "glasses")[0].metrics == catalog(home).load_task("1", "glasses")[0].metrics


@pytest.mark.parametrize(
    ("flags", "status", "told"),
    [
        (["--remote", "nowhere"], 2, "give HOST:PORT"),
        (["--remote", "127.0.0.1:99999"], 2, "give HOST:PORT"),
        (["--remote", "192.0.2.1:8443"], 2, "cannot listen at 192.0.2.1:8443"),
        (["--remote", "127.0.0.1:0", "--remote-certificate", "missing.pem"], 2, "a certificate needs its key"),
        (
            ["--remote", "127.0.0.1:0", "--remote-certificate", "a.pem", "--remote-key", "b.pem"],
            2,
            "there is no file a.pem",
        ),
        (["--remote-key", "b.pem"], 2, "are of --remote HOST:PORT"),
        (["--remote", "127.0.0.1:0", "--remote-patience-s", "0"], 2, "must be > 0"),
        (["--remote", "127.0.0.1:0", "--remote-patience-s", "1", "--restarts", "0"], 1, "was not heard of"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(home, write_parquet, capsys, flags, status, told):
    data = write_parquet()
    assert run_train("--data", data, "--private", "who", "--phase", "encoder", "--epsilon", "8") == 0
    capsys.readouterr()
    assert run_add("glasses", *flags) == status
    assert told in capsys.readouterr().err
