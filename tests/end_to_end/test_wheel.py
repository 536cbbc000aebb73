"""The wheel, in a fresh environment that holds what the base install brings and nothing else."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from environments import build_wheel, fresh_environment, run
from fake_task_server import TOKEN, FakeTaskServer
from small_head import small_head

HEAVY = ("torch", "ray", "mlflow", "opacus", "onnx", "pandas", "fastapi", "PIL", "tyro", "cattrs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of the fresh environment."""
    return fresh_environment(tmp_path_factory.mktemp("environment"), wheel)


@pytest.fixture
def served() -> Iterator[tuple[FakeTaskServer, str]]:
    """A task's server, and its URL."""
    fake = FakeTaskServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer = fake.answer(httpx.Request("GET", f"{url}{self.path}", headers=dict(self.headers)))
            body = b"".join(answer.stream)
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                if name.lower() != "content-length":
                    self.send_header(name, value)
            if answer.status_code != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, url = True, f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield fake, url
        server.shutdown()
        thread.join()


def test_the_wheel_runs_on_any_machine_and_holds_no_tests(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"orchestrator", "pipelines", "serve", "tasks"}


def test_the_client_predicts_with_the_base_install_alone(python, served, tmp_path):
    fake, url = served
    fake.publish(3)
    head = small_head(tmp_path / "head.onnx")
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)

    names = ", ".join(map(repr, HEAVY))
    code = f"from importlib.util import find_spec; import serve; print([n for n in ({names},) if find_spec(n)]); "
    done = run(python, "-c", code + "print(serve.__file__)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    visible, file = done.stdout.splitlines()
    assert visible == "[]"
    assert Path(file).is_relative_to(python.parent.parent)

    flags = ("--url", url, "--task", "smile", "--token-file", "token", "--head", head, "--threads", "1")
    done = run(python, "-m", "serve.edge", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert {line[2] for line in lines} <= {"no", "yes", "unsure"}
    assert done.stderr == ""


def test_what_needs_more_says_so_in_one_line(python, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    flags = ("--url", "http://127.0.0.1:9", "--task", "smile", "--token-file", "token", "--key-file", "key")
    done = run(python, "-m", "serve.edge.train", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this command needs torch: pip install 'metamorphosis-ray[tenant]'")
    assert done.stderr.count("\n") == 1
