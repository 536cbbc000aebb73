"""Frames reach the server once it takes them, and what cannot be sent is said in a line."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from served import digit_images, png
from tiny import ROOT

from serve import publish
from serve.publish import Frame, Publisher, PublishError, frames_of, main
from tasks.errors import ConfigError, DataError, UserError

OK = httpx.Response(200, headers={"X-Features": "1-1 of version 1.1-a"})


def refusal(status: int, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"status": status, "title": "the reason"}, headers=headers)


class Server:
    """Answers in turn; the last answer stays."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers, self.requests, self.pauses, self.now = list(answers), [], [], 0.0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def publisher(self, **options) -> Publisher:
        transport = httpx.MockTransport(self)
        given = {"sleep": self.sleep, "clock": lambda: self.now, "transport": transport, **options}
        return Publisher("http://127.0.0.1:8000/", "loop", "mm_token", **given)


def test_a_frame_is_posted_to_its_task_with_the_token():
    server = Server(OK)
    assert server.publisher().publish(Frame("a.png", b"pixels")) == "1-1 of version 1.1-a"
    (request,) = server.requests
    assert (request.method, str(request.url)) == ("POST", "http://127.0.0.1:8000/tasks/loop/features")
    assert request.headers["authorization"] == "Bearer mm_token" and request.content == b"pixels"


def test_what_may_pass_is_tried_again_with_growing_pauses_and_retry_after_is_waited_for():
    server = Server(httpx.ConnectError("refused"), refusal(503), refusal(429, **{"Retry-After": "7"}), refusal(502), OK)
    server.publisher().publish(Frame("a.png", b""))
    assert len(server.requests) == 5
    assert server.pauses[2] >= 7 and all(pause < 2 for pause in [*server.pauses[:2], server.pauses[3]])


def test_a_server_that_stays_away_is_given_up():
    server = Server(httpx.ConnectError("no route"))
    with pytest.raises(PublishError, match=r"a\.png was not taken for 30 s.*no route"):
        server.publisher(patience_s=30).publish(Frame("a.png", b""))
    assert 15 < server.now <= 30


@pytest.mark.parametrize(
    ("status", "kind"),
    [(415, DataError), (413, DataError), (401, UserError), (403, UserError), (404, UserError), (418, PublishError)],
)
def test_what_does_not_pass_is_told_at_once(status, kind):
    server = Server(refusal(status))
    with pytest.raises(kind, match="the reason"):
        server.publisher().publish(Frame("a.png", b""))
    assert len(server.requests) == 1 and server.pauses == []


@pytest.mark.parametrize("url", ["ftp://h", "nowhere", "http://", "http://192.0.2.1:8000"])
def test_an_address_that_is_none_or_gives_the_token_away_is_refused(url):
    with pytest.raises(ConfigError):
        Publisher(url, "loop", "t")
    Publisher("http://192.0.2.1:8000", "loop", "t", plain_http=True)


@pytest.fixture
def device(shop, tmp_path, monkeypatch):
    """A folder of images, a token, and a server in this process behind every publisher."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for n, image in enumerate(digit_images(3)):
        (folder / f"{n}.png").write_bytes(png(image))
    (folder / "notes.txt").write_text("no image")
    headers = shop.token("camera", "device", loop=["publish"])
    token = tmp_path / "camera.token"
    token.write_text(headers["Authorization"].removeprefix("Bearer ") + "\n")
    token.chmod(0o600)
    client = shop.client("loop")

    class Bridge(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            path = request.url.path.removeprefix("/tasks/loop")
            answer = client.request(request.method, path, content=request.read(), headers=dict(request.headers))
            headers = {name: value for name, value in answer.headers.items() if name != "content-encoding"}
            return httpx.Response(answer.status_code, content=answer.content, headers=headers)

    real = Publisher.__init__
    monkeypatch.setattr(Publisher, "__init__", lambda self, *a, **k: real(self, *a, **k, transport=Bridge()))
    flags = ["--source", str(folder), "--url", "http://127.0.0.1:1", "--task", "loop", "--token-file", str(token)]
    return shop, folder, token, flags


def test_a_folder_is_published_in_the_order_of_its_names(device, capsys):
    shop, _, _, flags = device
    assert main([*flags, "--fps", "1000"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("3 frames published; the last is 3-3 of version 1.1-")
    found = shop.store("loop").after(0, limit=9)
    wanted = shop.model("loop").features(digit_images(3))
    np.testing.assert_allclose(np.stack([f.z for f in found]), wanted, atol=2**-9 * float(np.abs(wanted).max()))


def test_an_image_that_is_refused_is_named_and_the_others_are_sent(device, capsys):
    _, folder, _, flags = device
    (folder / "1.png").write_bytes(b"broken")
    assert main(flags) == 1
    told = capsys.readouterr()
    assert "2 frames published, 1 refused" in told.out and "1.png was refused (415" in told.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder, token: token.chmod(0o644), "others can read the token"),
        (lambda folder, token: token.unlink(), "cannot read the token"),
        (lambda folder, token: token.write_text("\n"), "holds no token"),
        (lambda folder, token: token.write_text("mm_wrong"), "the token was refused (401"),
        (lambda folder, token: [file.unlink() for file in folder.glob("*.png")], "holds no image"),
        (lambda folder, token: shutil.rmtree(folder), "there is no"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(device, capsys, change, words):
    _, folder, token, flags = device
    change(folder, token)
    assert main(flags) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def test_a_video_or_camera_without_opencv_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "film.mp4").write_bytes(b"film")
    for source in (str(tmp_path / "film.mp4"), "camera", "camera:1"):
        with pytest.raises(ConfigError, match="pip install opencv-python-headless"):
            list(frames_of(source))
    with pytest.raises(ConfigError, match="no camera"):
        frames_of("camera:front")


def test_frames_of_a_video_are_read_until_it_ends(tmp_path, monkeypatch):
    class Capture:
        def __init__(self, source) -> None:
            self.left = 2

        def isOpened(self):  # noqa: N802 - OpenCV's
            return True

        def read(self):
            self.left -= 1
            return self.left >= 0, np.zeros((4, 4, 3), np.uint8)

        def release(self):
            Capture.released = True

    fake = type(sys)("cv2")
    fake.VideoCapture, fake.IMWRITE_JPEG_QUALITY = Capture, 1
    fake.imencode = lambda kind, picture, options: (True, np.frombuffer(b"jpeg", np.uint8))
    monkeypatch.setitem(sys.modules, "cv2", fake)
    (tmp_path / "film.mp4").write_bytes(b"film")
    assert [frame.data for frame in frames_of(str(tmp_path / "film.mp4"))] == [b"jpeg", b"jpeg"]
    assert Capture.released


def test_a_device_needs_httpx_alone():
    tree = ast.parse(Path(publish.__file__).read_text(), feature_version=(3, 9))
    top = {n.module for n in tree.body if isinstance(n, ast.ImportFrom)} | {
        a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names
    }
    assert {name.partition(".")[0] for name in top} - set(sys.stdlib_module_names) == {"httpx", "serve", "tasks"}
    loaded = "import sys, serve.publish; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"numpy", "torch", "ray", "safetensors", "cryptography", "orchestrator", "onnxruntime"}
    assert "httpx" in done.stdout.split()
    assert not set(done.stdout.split()) & heavy
