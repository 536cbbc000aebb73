"""A task's endpoints as `docs/serving.md` describes them, in memory, behind an httpx transport. No Ray, no network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np

from serve.codec import compress, encode, media_type, negotiate

TOKEN = "mm_0123456789abcdef_" + 43 * "A"


class FakeTaskServer:
    """Holds what was published. ``before`` may answer a request in its place, or raise."""

    def __init__(self, task: str = "smile", version: str = "1.2-0123456789ab", shape=(8, 4, 4)) -> None:
        self.task, self.version, self.shape = task, version, shape
        self.published: list[tuple[int, str, np.ndarray]] = []
        self.requests: list[httpx.Request] = []
        self.oldest = 1
        self.canary: tuple[str, float] | None = None
        """A version on trial, and the share of the images that go to it."""
        self.before: Callable[[httpx.Request], httpx.Response | None] = lambda _: None

    def publish(self, n: int = 1, *, version: str | None = None) -> np.ndarray:
        first = self.published[-1][0] + 1 if self.published else 1
        z = np.random.default_rng(first).standard_normal((n, *self.shape)).astype(np.float32)
        self.published += [(first + i, version or self.version, z[i]) for i in range(n)]
        return z

    def forget(self, below: int) -> None:
        self.oldest = below
        self.published = [entry for entry in self.published if entry[0] >= below]

    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(lambda request: unread(self.answer(request)))

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if (instead := self.before(request)) is not None:
            return instead
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _problem(401, "no valid token was given")
        prefix = f"/tasks/{self.task}/"
        if not request.url.path.startswith(prefix):
            return _problem(404, "there is no such task for this token")
        name, params = request.url.path.removeprefix(prefix), request.url.params
        wanted = params.get("version")
        if name == "metadata":
            return self._metadata(wanted or self.version)
        found = [entry for entry in self.published if wanted in (None, entry[1])]
        if name == "features/latest":
            return self._body(request, found[-1:])
        after = int(params.get("after", 0))
        found = [entry for entry in found if entry[0] > after][: int(params.get("limit", 16))]
        return self._body(request, [entry for entry in found if entry[1] == found[0][1]])

    def _metadata(self, version: str) -> httpx.Response:
        canary, share = self.canary or ("", 0.0)
        shares = {canary: share, self.version: 1 - share}
        if version not in shares:
            return _problem(404, "there is no such task for this token")
        known = {"task": self.task, "version": version, "shape": list(self.shape), "share": shares[version]}
        return httpx.Response(200, json=known)

    def _body(self, request: httpx.Request, entries: list[tuple[int, str, np.ndarray]]) -> httpx.Response:
        if not entries:
            return httpx.Response(204)
        precision, encoding = negotiate(request.headers.get("accept", ""), request.headers.get("accept-encoding", ""))
        body = encode(
            {
                "z": np.stack([z for _, _, z in entries]),
                "sequence": np.array([n for n, _, _ in entries], dtype=np.int64),
                "time_ms": np.array([1_700_000_000_000 + n for n, _, _ in entries], dtype=np.int64),
            },
            precision=precision,
            metadata={
                "task": self.task,
                "version": entries[0][1],
                "last": str(entries[-1][0]),
                "oldest": str(self.oldest),
            },
        )
        headers = {"Content-Type": media_type(precision)} | (
            {"Content-Encoding": encoding} if encoding != "identity" else {}
        )
        return httpx.Response(200, stream=httpx.ByteStream(compress(body, encoding)), headers=headers)


def unread(response: httpx.Response) -> httpx.Response:
    """As it comes from a network: httpx takes the body of a response that is made with ``content`` as read already."""
    if not response.is_stream_consumed:
        return response
    return httpx.Response(response.status_code, headers=response.headers, stream=httpx.ByteStream(response.content))


def _problem(status: int, title: str, **headers: Any) -> httpx.Response:
    return httpx.Response(status, json={"status": status, "title": title}, headers=headers)
