"""The Kubernetes manifests: of the right shape, and their commands are commands of this project."""

from __future__ import annotations

import copy
import json
import shlex

import jsonschema
import pytest
import yaml
from tiny import ROOT

from orchestrator.config import read_toml
from orchestrator.settings.add_task import AddTaskSettings
from orchestrator.sweep.settings import SweepSettings
from pipelines.command import parse, preset_path

DEPLOY = ROOT / "docs" / "deploy"
SCHEMA = json.loads((DEPLOY / "kuberay.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
MANIFESTS = {
    f"{path.stem} {n}": document
    for path in sorted(DEPLOY.glob("*.yaml"))
    for n, document in enumerate(yaml.safe_load_all(path.read_text()))
}


def test_there_are_a_cluster_and_two_jobs():
    assert sorted(m["kind"] for m in MANIFESTS.values()) == ["PersistentVolumeClaim", "RayCluster", "RayJob", "RayJob"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_the_shape_of_its_kind(name):
    VALIDATOR.validate(MANIFESTS[name])


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("raycluster 1", ["spec", "headGroupSpecs"], {}),
        ("raycluster 1", ["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        ("raycluster 1", ["spec", "workerGroupSpecs", 0, "minReplica"], 1),
        ("raycluster 1", ["spec", "workerGroupSpecs", 0, "maxReplicas"], "8"),
        ("raycluster 1", ["spec", "headGroupSpec", "template", "spec", "containers"], []),
        ("rayjob-sweep 0", ["spec", "entryPoint"], "python x.py"),
        ("rayjob-sweep 0", ["spec", "submissionMode"], "K8SJobMode"),
        ("rayjob-sweep 0", ["spec", "rayClusterSpec"], {}),
        ("rayjob-sweep 0", ["apiVersion"], "ray.io/v1beta9"),
    ],
)
def test_a_slip_is_found(name, path, value):
    broken = copy.deepcopy(MANIFESTS[name])
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not VALIDATOR.is_valid(broken)


def arguments(name: str) -> list[str]:
    words = shlex.split(MANIFESTS[name]["spec"]["entrypoint"])
    assert words[0] == "python" and (ROOT / words[1].removeprefix("/opt/metamorphosis/")).exists()
    return words[2:]


def test_the_jobs_commands_are_understood():
    sweep = parse(SweepSettings, arguments("rayjob-sweep 0"), prog="sweep.py", presets=True)
    sweep.check()
    assert len(sweep.searched.grid()) == 45 and sweep.runtime.is_remote
    assert sweep.private == read_toml(SweepSettings, preset_path("digits")).private
    assert parse(AddTaskSettings, arguments("rayjob-add-task 0"), prog="add_task.py").task == "digit"


def test_jobs_find_the_cluster_and_its_secrets():
    cluster = MANIFESTS["raycluster 1"]
    for name in ("rayjob-sweep 0", "rayjob-add-task 0"):
        job = MANIFESTS[name]["spec"]
        assert job["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    pods = [cluster["spec"]["headGroupSpec"]["template"], cluster["spec"]["workerGroupSpecs"][0]["template"]]
    pods += [MANIFESTS[name]["spec"]["submitterPodTemplate"] for name in ("rayjob-sweep 0", "rayjob-add-task 0")]
    for pod in pods:
        variables = {v["name"]: v for v in pod["spec"]["containers"][0]["env"]}
        assert variables["RAY_AUTH_MODE"]["value"] == "token"
        assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "ray-token", "key": "token"}
    mounted = [m["name"] for m in pods[1]["spec"]["containers"][0]["volumeMounts"]]
    assert mounted == ["scratch"], "workers share no disk with the head, which alone has the ledger"
