"""What is to be served, and how it is asked for: state, flags, files. Nothing here starts Ray."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from served import AppClient

from orchestrator.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NotPublishedError,
    PrivacyRefusal,
    UnavailableError,
)
from orchestrator.evaluation.comparison import FORMAT
from pipelines import deploy
from pipelines.command import execute
from serve.arguments import CatalogArgs, ReplicaArgs, TaskArgs, VersionArgs, task_app_name
from serve.deployment import environment, state
from serve.deployment.cluster import check_ports
from serve.deployment.environment import (
    Entrance,
    serve_environment,
    write_haproxy_limits,
    write_haproxy_script,
)
from serve.deployment.head import Head, HeadFile
from serve.deployment.planning import entrance_of, version_of
from serve.deployment.render import Pod, rayservice, serve_config
from serve.deployment.state import Deployed, Deployments, DeploymentsFile
from serve.front import build_front
from serve.leakage import measured, newest_evaluation
from serve.problems import busy, response_to
from serve.settings import EntranceSettings
from serve.versions import served_version

ONE, TWO, THREE = (VersionArgs(encoder_version=str(n), version=f"{n}.1-{str(n) * 12}") for n in (1, 2, 3))


def deployed(task: str = "loop", **changes: object) -> Deployed:
    source = CatalogArgs(tracking_uri="sqlite:////home/p/mlflow.db", catalog="digits", storage="/home/p")
    given = {"registry": "/home/p/tenants/registry.db", "streams": "/home/p/serving/streams", "current": ONE, **changes}
    return Deployed(args=TaskArgs(task=task, source=source, **given))


# -- versions of a task ------------------------------------------------------------------------------------------------


def test_an_update_can_be_rolled_back_step_by_step():
    one = deployed()
    three = one.updated(TWO, None).updated(THREE, None)
    assert (three.args.current, three.previous) == (THREE, (TWO, ONE))
    back = three.rolled_back()
    assert (back.args.current, back.previous) == (TWO, (ONE,))
    assert back.rolled_back() == one
    with pytest.raises(ConfigError, match="no version of task 'loop' was served before"):
        one.rolled_back()


def test_a_canary_is_tried_dropped_or_promoted():
    tried = deployed().updated(TWO, 0.1)
    assert (tried.args.current, tried.args.canary, tried.args.share, tried.previous) == (ONE, TWO, 0.1, ())
    assert tried.rolled_back() == deployed()
    promoted = tried.updated(TWO, None)
    assert (promoted.args.current, promoted.args.canary, promoted.args.share) == (TWO, None, 0.0)
    assert promoted.previous == (ONE,)
    with pytest.raises(ConfigError, match="served already"):
        deployed().updated(ONE, 0.1)


def test_updating_to_the_same_version_leaves_nothing_to_roll_back_to():
    assert deployed().updated(ONE, None) == deployed()


def test_arguments_refuse_what_they_do_not_know():
    for kind, values in ((ReplicaArgs, {"cpus": 1}), (ReplicaArgs, {"min_replicas": 0}), (TaskArgs, {"share": 2})):
        with pytest.raises(ValidationError):
            kind.model_validate(values)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    file = DeploymentsFile(tmp_path / "serving" / "deployments.json")
    assert file.read() == Deployments()
    with file.locked() as deployments:
        deployments.tasks["loop"] = deployed().updated(TWO, None).updated(THREE, 0.25)
        deployments.tasks["digit"] = deployed("digit")
        file.write(deployments)
    assert file.read() == deployments
    with pytest.raises(NotPublishedError, match="served: digit, loop"):
        file.read().one("lop")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "tasks": {}}',
        '{"format": 1, "tasks": {"a": {}}}',
        '{"format": 1, "tasks": {"a": {"args": {"task": 1}, "previous": []}}}',
    ],
)
def test_a_file_that_is_something_else_is_not_taken_for_nothing(tmp_path, text):
    (tmp_path / "deployments.json").write_text(text)
    with pytest.raises(CheckpointError, match="does not say what is served"):
        DeploymentsFile(tmp_path / "deployments.json").read()


def test_one_command_changes_it_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "_PATIENCE_S", 0.1)
    file, other = (DeploymentsFile(tmp_path / "deployments.json") for _ in range(2))
    with file.locked(), pytest.raises(UnavailableError, match="another deploy"), other.locked():
        pass
    with other.locked():
        pass


# -- the cluster -------------------------------------------------------------------------------------------------------


def test_a_head_that_died_or_whose_number_is_another_processs_counts_as_none(tmp_path):
    file = HeadFile(tmp_path)
    child = subprocess.Popen(["sleep", "60"])
    import psutil

    born = psutil.Process(child.pid).create_time()
    try:
        file.write(Head(address="127.0.0.1:1", entrance=Entrance(), pid=child.pid, created=born))
        assert file.read().address == "127.0.0.1:1"
        file.write(Head(address="127.0.0.1:1", entrance=Entrance(), pid=child.pid, created=born - 1000))
        assert file.read() is None
        file.stop(Head(address="127.0.0.1:1", entrance=Entrance(), pid=child.pid, created=born - 1000))
        assert child.poll() is None, "somebody else's process is left alone"
        file.write(Head(address="127.0.0.1:1", entrance=Entrance(), pid=child.pid, created=born))
    finally:
        child.kill()
        child.wait()
    assert file.read() is None
    file.write(Head(address="head:6379", entrance=Entrance()))
    assert file.read() is not None, "a cluster that was joined"


def test_the_token_of_the_cluster_is_made_once_and_is_for_its_owner(tmp_path):
    file = HeadFile(tmp_path / "serving")
    given = file.authentication()
    token = file.token.read_text()
    assert given == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file.token)} == file.authentication()
    assert len(token) == 64 and file.token.read_text() == token
    assert stat.S_IMODE(file.token.stat().st_mode) == 0o600
    assert (
        len(str(file.scratch / "ray" / "session_2026-01-01_00-00-00_000000_1000000" / "sockets" / "plasma_store")) < 107
    )


def test_a_port_that_is_taken_is_said_before_anything_is_started(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError, match=f"port {port} cannot be listened at.*--port"):
            check_ports(Entrance(port=port))
        monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", str(port))
        with pytest.raises(UnavailableError, match="RAY_SERVE_HAPROXY_STATS_PORT"):
            check_ports(Entrance(port=port + 1 if port < 65535 else port - 1, haproxy=True))


def test_haproxy_is_on_where_it_is_installed_and_there_is_no_certificate(tmp_path, monkeypatch):
    files = EntranceSettings(tls="files", certificate=Path("/c.pem"), key=Path("/k.pem"))
    for binary, wanted in (("/bin/true", True), (None, False)):
        monkeypatch.setattr("serve.deployment.planning.haproxy_binary", lambda binary=binary: binary)
        assert entrance_of(EntranceSettings(), tmp_path, there=None).haproxy is wanted
        assert entrance_of(EntranceSettings(haproxy="off"), tmp_path, there=None).haproxy is False
        assert entrance_of(files, tmp_path, there=None).haproxy is False
    assert entrance_of(files, tmp_path, there=None).http_options()["ssl_keyfile"] == "/k.pem"
    with pytest.raises(ConfigError, match="no TLS"):
        EntranceSettings(haproxy="on", tls="self-signed")
    with pytest.raises(ConfigError, match="all three"):
        EntranceSettings(certificate=Path("/c.pem"))


def test_what_is_not_said_of_an_entrance_that_is_there_stays_and_nothing_else_may_be_said(tmp_path):
    there = Entrance(host="0.0.0.0", port=9000, haproxy=True)
    assert entrance_of(EntranceSettings(), tmp_path, there=there) == there
    assert entrance_of(EntranceSettings(port=9000), tmp_path, there=there) == there
    with pytest.raises(ConfigError, match="cannot be moved"):
        entrance_of(EntranceSettings(port=8000), tmp_path, there=there)


@pytest.mark.filterwarnings("ignore")  # of Ray's own code, when it is loaded
def test_haproxys_configuration_is_mended_before_it_is_read(tmp_path, monkeypatch):
    from ray.serve._private import haproxy_templates

    monkeypatch.setattr(environment, "haproxy_binary", lambda: "/bin/cat")
    chosen = serve_environment(Entrance(haproxy=True), tmp_path)
    write_haproxy_script(tmp_path)
    script = chosen["RAY_SERVE_HAPROXY_BINARY_PATH"]
    template = "\n".join(v for v in vars(haproxy_templates).values() if isinstance(v, str) and "bind" in v)
    # The lines of Ray's own template that matter, as Ray would fill them in.
    lines = [line for line in template.splitlines() if re.search(r"\bbind \*?:|routes", line) and "#" not in line]
    text = "\n".join(re.sub(r"\{\{ .*?port \}\}", "9101", line) for line in lines) + "\n    bind 0.0.0.0:8000\n"
    assert "acl routes path" in text and "route_info" in text and "bind *:9101" in text and "bind :9101" in text
    config = tmp_path / "haproxy.cfg"
    config.write_text(text)
    subprocess.run([script, "-db", "-f", str(config)], check=False, capture_output=True)
    mended = config.read_text()
    assert "acl routes" not in mended and "if routes" not in mended
    assert re.findall(r"bind (\S+)", mended).count("127.0.0.1:9101") == 2 and "bind 0.0.0.0:8000" in mended
    assert "/tmp/haproxy-serve" not in str(chosen), "its socket takes orders from whoever can open it"


@pytest.mark.filterwarnings("ignore")  # of Ray's own code, when it is loaded
def test_requests_wait_in_haproxy_and_what_nobody_answered_may_be_asked_again(tmp_path, monkeypatch):
    """Ray's own configuration with two apps, each with two replicas and the proxy that stands in."""
    from jinja2 import Environment
    from ray.serve._private.haproxy import BackendConfig, HAProxyConfig, ServerConfig
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    monkeypatch.setattr(environment, "haproxy_binary", lambda: "/bin/true")
    script = serve_environment(Entrance(haproxy=True), tmp_path)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    write_haproxy_script(tmp_path)
    write_haproxy_limits(tmp_path, {task_app_name("loop"): 64, task_app_name("loop2"): 8})

    def server(name: str) -> ServerConfig:
        return ServerConfig(name=name, host="127.0.0.1", port=30000)

    apps = [task_app_name("loop"), task_app_name("loop2"), "front"]
    backends = [
        BackendConfig(
            name=f"http-{app}",
            app_name=app,
            path_prefix="/",
            servers=[server(f"{app}-{n}") for n in "ab"],
            fallback_server=server(f"{app}-stands-in"),
        )
        for app in apps
    ]
    config = HAProxyConfig()
    config.error_file_path = "/of/ray/500.http"
    rendered = Environment()
    rendered.filters["haproxy_fmt"] = json.dumps
    health = {"default_server_directive": "default-server check"}
    text = rendered.from_string(HAPROXY_CONFIG_TEMPLATE).render(
        config=config,
        backends=backends,
        backends_with_health_config=[{"backend": backend, "health_config": health} for backend in backends],
        route_info={"routes_message": "{}"},
        healthz_rules="",
    )
    file = tmp_path / "haproxy.cfg"
    file.write_text(text)
    subprocess.run([script, "-f", str(file)], check=True)
    limits = dict(re.findall(r"^ *server (\S+) \S+ check(?: maxconn (\d+))?", file.read_text(), flags=re.M))
    assert limits == {
        **{f"task-loop-{n}": "64" for n in "ab"},
        **{f"task-loop2-{n}": "8" for n in "ab"},
        **{f"front-{n}": "" for n in "ab"},
        **{f"{app}-stands-in": "" for app in apps},
    }
    assert re.search(r"^defaults\n +timeout queue 15s$", file.read_text(), flags=re.M)
    told = dict(re.findall(r"^ *errorfile (\d+) (\S+)$", file.read_text(), flags=re.M))
    assert told == dict.fromkeys(("502", "503", "504"), str(tmp_path / "503.http"))
    head, _, body = (tmp_path / "503.http").read_bytes().partition(b"\r\n\r\n")
    wanted = response_to(busy())
    assert body == wanted.body and head.startswith(b"HTTP/1.1 503 ")
    found = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:])
    assert found == {name: value.lower() for name, value in wanted.headers.items()}


def test_no_secret_is_in_the_environment_of_other_clusters(tmp_path):
    assert not [name for name in serve_environment(Entrance(), tmp_path) if "TOKEN" in name or "KEY" in name]


# -- nothing there -----------------------------------------------------------------------------------------------------


def test_the_front_answers_as_a_task_that_is_somebody_elses(shop):
    front, loop = AppClient(build_front(shop.gate)), shop.client("loop")
    eve = shop.token("eve", "tenant", large=["read"])
    for method, path in (("GET", "/features"), ("POST", "/features"), ("GET", "/metadata"), ("GET", "/x")):
        for headers in ({}, eve):
            here, there = (
                loop.request(method, path, headers=headers),
                front.request(method, f"/tasks/no{path}", headers=headers),
            )
            assert (here.status_code, here.content, here.headers) == (there.status_code, there.content, there.headers)
    assert front.get("/tasks/large/features", headers=eve).status_code == 404
    assert front.get("/", headers=eve).status_code == 404 and front.get("/").status_code == 401


# -- what the catalog allows -------------------------------------------------------------------------------------------


def test_only_what_is_published_and_not_private_becomes_a_version(shop, tmp_path):
    version = version_of(shop.catalog, "latest", "loop", tmp_path, None)
    assert version == VersionArgs(encoder_version="2", version=served_version(shop.catalog.tasks("2")["loop"]))
    with pytest.raises(PrivacyRefusal, match="never served"):
        version_of(shop.catalog, "1", "parity", tmp_path, None)
    with pytest.raises(NotPublishedError, match="known: loop, large, digit") as refusal:
        version_of(shop.catalog, "1", "lop", tmp_path, None)
    assert "parity" not in str(refusal.value)


def evaluation(path: Path, *, encoder: str = "1", rows: list[dict] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    subject = {"catalog": "digits", "encoder": {"version": encoder}, "created": "2026-01-31"}
    leakage = None if rows is None else {"rows": rows}
    path.write_text(json.dumps({"format": FORMAT, "subject": subject, "budget": "full", "leakage": leakage}))
    return path


def test_metadata_tells_the_worst_that_was_measured_and_names_no_target(tmp_path):
    rows = [
        {"feature": "loop", "target": "large", "excess": 0.2, "leak_bits": 0.9},
        {"feature": "loop", "target": "parity", "excess": 0.34, "leak_bits": None},
        {"feature": "large", "target": "loop", "excess": 0.9, "leak_bits": 3.0},
    ]
    path = evaluation(tmp_path / "evaluation.json", rows=rows)
    told = measured(path, "loop")
    assert told == {"budget": "full", "evaluated": "2026-01-31", "targets": 2, "excess": 0.34, "bits": 0.9}
    assert measured(path, "digit") is None and measured(evaluation(tmp_path / "e.json"), "loop") is None


def test_the_newest_evaluation_of_the_encoder_is_taken(tmp_path):
    old = evaluation(tmp_path / "evaluations" / "a" / "evaluation.json")
    new = evaluation(tmp_path / "evaluations" / "b" / "evaluation.json")
    evaluation(tmp_path / "evaluations" / "c" / "evaluation.json", encoder="2")
    os.utime(old, (time.time() - 100, time.time() - 100))
    assert newest_evaluation(tmp_path, catalog="digits", encoder_version="1") == new
    assert newest_evaluation(tmp_path, catalog="digits", encoder_version="3") is None
    (tmp_path / "evaluations" / "a" / "evaluation.json").write_text("{}")
    with pytest.raises(DataError, match="no evaluation that this program reads"):
        measured(old, "loop")


# -- files for other tools ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of Ray's own code, when it is loaded
def test_the_serve_config_is_one_that_serve_reads_and_builds_the_same_apps():
    from ray.serve.schema import ServeDeploySchema

    deployments = Deployments(tasks={"loop": deployed(shared_encoder=True), "digit": deployed("digit")})
    config = yaml.safe_load(yaml.safe_dump(serve_config(deployments, Entrance(port=9000))))
    read = ServeDeploySchema.model_validate(config)
    assert {app.name: app.route_prefix for app in read.applications} == {
        "task-loop": "/tasks/loop",
        "task-digit": "/tasks/digit",
        "encoder-digits-1": None,
        "front": "/",
    }
    args = {app.name: app.args for app in read.applications}
    assert TaskArgs.model_validate(args["task-loop"]) == deployments.tasks["loop"].args
    assert read.http_options.port == 9000 and read.http_options.host == "127.0.0.1"


def test_the_manifest_has_the_config_inside_with_the_paths_of_the_volume():
    config = serve_config(Deployments(tasks={"loop": deployed()}), Entrance())
    pod = Pod(image="registry.example/m:1", storage_claim="claim", cpus=4, memory="8Gi")
    manifest = rayservice(config, pod, {"A": "1"}, storage="/home/p", ray_version="2.60.0")
    spec = manifest["spec"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    inner = yaml.safe_load(spec["serveConfigV2"])
    args = next(app for app in inner["applications"] if app["name"] == "task-loop")["args"]
    assert args["source"]["tracking_uri"] == "sqlite:////storage/mlflow.db"
    assert args["registry"] == "/storage/tenants/registry.db"
    assert "/home/p" not in str(manifest) and inner["http_options"]["host"] == "0.0.0.0"
    container = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "registry.example/m:1" and {"name": "A", "value": "1"} in container["env"]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["update", "loop"], "task 'loop' is not served"),
        (["rollback", "loop"], "task 'loop' is not served"),
        (["scale", "loop"], "task 'loop' is not served"),
        (["down", "loop"], "task 'loop' is not served"),
        (["down"], "--all"),
        (["down", "loop", "--all"], "--all"),
        (["update", "loop", "--share", "1"], "share must be"),
        (["scale", "loop", "--min-replicas", "2", "--max-replicas", "1"], "at least"),
        (["render", "out"], "nothing is served"),
        (["up", "--num-cpus", "-1"], "must be >= 0"),
        (["up", "--min-replicas", "2"], "at least min_replicas"),
        (["up", "--tls", "files"], "--certificate"),
        (["up", "--port", "70000"], "between 1 and 65535"),
        (["status", "--timeout-s", "0"], "timeout_s"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setenv("METAMORPHOSIS_HOME", str(tmp_path))
    assert execute("serve.settings:DeploySettings", deploy.run, flags, prog="deploy.py") == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def test_the_status_of_nothing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("METAMORPHOSIS_HOME", str(tmp_path))
    assert execute("serve.settings:DeploySettings", deploy.run, ["status"], prog="deploy.py") == 0
    assert "Serve does not run" in capsys.readouterr().out
