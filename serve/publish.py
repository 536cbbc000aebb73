"""The producer's device sends frames to a task: ``python -m serve.publish --help``. Needs httpx alone; Python 3.9.

    python -m serve.publish --source frames/ --url https://127.0.0.1:8000 --task loop --token-file camera.token

A frame that could not be sent is sent again, with growing pauses that are drawn at random, and a server's Retry-After
is waited for. One that the server refuses as an image is named and left out.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from serve.connection import (
    Patience,
    checked_token,
    checked_url,
    read_token,
    retry_after,
    trust,
    untrusted,
)
from tasks.errors import ConfigError, DataError, MetaMorphosisError, UserError

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that may be over when one asks again."""
_OF_THE_IMAGE: Final = frozenset({400, 413, 415, 422})
"""Statuses that another image may not get."""
_JPEG_QUALITY: Final = 95
_FIRST_S: Final = 0.2
_LONGEST_S: Final = 10.0
"""Of the pauses before a frame is sent again: the next ones wait behind it."""


class PublishError(MetaMorphosisError):
    """The server did not take a frame, and would not take another one."""


@dataclass(frozen=True)
class Frame:
    """One image, as its file is."""

    name: str
    data: bytes = field(repr=False)


@dataclass
class Tally:
    """What became of the frames."""

    sent: int = 0
    refused: int = 0
    last: str = ""
    """What the server said of the last one: numbers and version."""


class Publisher:
    """One keep-alive connection to one task's endpoint, as the holder of one token. A context manager."""

    def __init__(
        self,
        url: str,
        task: str,
        token: str,
        *,
        ca: Path | None = None,
        plain_http: bool = False,
        patience_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``patience_s`` is for one frame. Raises `ConfigError` for an address that gives the token away."""
        self._patience_s, self._sleep, self._clock = patience_s, sleep, clock
        self._pauses = Patience(total_s=patience_s, first_s=_FIRST_S, longest_s=_LONGEST_S)
        self._draw = random.Random()  # noqa: S311 - for pauses
        self._url = checked_url(url, plain_http=plain_http)
        self._client = httpx.Client(
            base_url=f"{self._url}/tasks/{task}",
            headers={
                "Authorization": f"Bearer {checked_token(token)}",
                "Accept": "application/x-safetensors;precision=int8",
            },
            timeout=httpx.Timeout(30.0, connect=10.0),
            verify=trust(ca),
            transport=transport,
        )

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def publish(self, frame: Frame) -> str:
        """Send one, and return the server's numbers for it.

        Raises `DataError` if the server does not take this image, `UserError` if it does not take the token or has no
        such task for it, and `PublishError` if it did not answer for as long as it was tried, or is not to be trusted.
        """
        started, attempt = self._clock(), 0
        while True:
            asked_s = 0.0
            try:
                response = self._client.post("/features", content=frame.data)
            except httpx.RequestError as error:
                if (reason := untrusted(self._url, error)) is not None:
                    raise PublishError(reason) from error
                told = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return str(response.headers.get("X-Features", ""))
                told = f"{response.status_code}: {_title(response)}"
                _raise_for_good(response.status_code, told, frame.name)
                asked_s = retry_after(response.headers.get("Retry-After"))
            pause_s = self._pauses.pause(attempt, asked_s, self._draw)
            if self._clock() - started + pause_s > self._patience_s:
                raise PublishError(f"{frame.name} was not taken for {self._patience_s:g} s; the last try gave {told}")
            self._sleep(pause_s)
            attempt += 1


def publish_all(
    publisher: Publisher, frames: Iterable[Frame], *, fps: float | None, on_refused: Callable[[str], None]
) -> Tally:
    """Every frame, at most so many a second."""
    tally, next_at = Tally(), time.monotonic()
    for frame in frames:
        if fps is not None:
            time.sleep(max(0.0, next_at - time.monotonic()))
            next_at = max(next_at, time.monotonic() - 1 / fps) + 1 / fps
        try:
            tally.last = publisher.publish(frame)
            tally.sent += 1
        except DataError as error:
            tally.refused += 1
            on_refused(str(error))
    return tally


def frames_of(source: str) -> Iterator[Frame]:
    """Of a folder of images, in the order of their names; of a video file; of ``camera`` or ``camera:N``.

    Raises `DataError`, and `ConfigError` where a video or camera needs what is not installed.
    """
    if source == "camera" or source.startswith("camera:"):
        number = source.partition(":")[2] or "0"
        if not number.isdecimal():
            raise ConfigError(f"{source!r} is no camera: give camera, or camera:N with a number")
        return _recorded(int(number), source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _recorded(str(path), source)
    raise DataError(f"there is no {path}: give a folder of images, a video file, or camera")


def _folder(path: Path) -> Iterator[Frame]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"{path} holds no image ({', '.join(sorted(SUFFIXES))})")
    for file in files:
        try:
            yield Frame(file.name, file.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from error


def _recorded(source: int | str, name: str) -> Iterator[Frame]:
    try:
        import cv2
    except ImportError:
        raise ConfigError(f"reading {name} needs OpenCV: pip install opencv-python-headless") from None
    capture: Any = cv2.VideoCapture(source)
    try:
        if not capture.isOpened():
            raise DataError(f"{name} cannot be opened: is it a video, or a camera that this user may use?")
        number = 0
        while True:
            there, picture = capture.read()
            if not there:
                break
            encoded, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
            if encoded:
                yield Frame(f"{name} frame {number}", data.tobytes())
            number += 1
        if number == 0:
            raise DataError(f"{name} holds no frame that can be read")
    finally:
        capture.release()


def _raise_for_good(status: int, told: str, name: str) -> None:
    """For what asking again does not change."""
    if status in _OF_THE_IMAGE:
        raise DataError(f"{name} was refused ({told})")
    if status in {401, 403}:
        raise UserError(f"the token was refused ({told}): it is wrong, expired or revoked, or its quota is used up")
    if status == 404:
        raise UserError(f"no such task for this token ({told}): it needs the grant to publish this one")
    if status not in _PASSING:
        raise PublishError(f"{name} was refused ({told})")


def _title(response: httpx.Response) -> str:
    try:
        problem = response.json()
        return ": ".join(str(problem[key]) for key in ("title", "detail") if problem.get(key))[:300]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "no explanation"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done; 1 the server failed, or refused images; 2 what was asked cannot be done; 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        token = read_token(arguments.token_file)
        with Publisher(
            arguments.url,
            arguments.task,
            token,
            ca=arguments.ca,
            plain_http=arguments.plain_http,
            patience_s=arguments.patience_s,
        ) as publisher:
            tally = publish_all(publisher, frames_of(arguments.source), fps=arguments.fps, on_refused=_warn)
    except KeyboardInterrupt:
        return 130
    except MetaMorphosisError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201 - a command
        return error.exit_code
    refused = f", {tally.refused} refused" if tally.refused else ""
    print(f"{tally.sent} frames published{refused}; the last is {tally.last or 'none'}")  # noqa: T201 - a command
    return 1 if tally.refused else 0


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - of a command


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve.publish", description="Send frames to a served task.")
    parser.add_argument("--source", required=True, help="a folder of images, a video file, camera, or camera:N")
    parser.add_argument("--url", required=True, help="the server, like https://127.0.0.1:8000")
    parser.add_argument("--task", required=True, help="the task to publish for")
    parser.add_argument("--token-file", required=True, type=Path, help="file of the device's token, mode 600")
    parser.add_argument("--ca", type=Path, help="the server's certificate, or the authority's that signed it")
    parser.add_argument("--plain-http", action="store_true", help="send images and token in clear to another machine")
    parser.add_argument("--fps", type=_positive, help="at most so many frames a second")
    parser.add_argument("--patience-s", type=_positive, default=60.0, help="seconds for which a frame is tried")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
