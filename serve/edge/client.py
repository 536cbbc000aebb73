"""A tenant's view of its task: features as the producer publishes them, and what the head says of each. Python 3.9.

    with EdgeClient("https://features.example:8000", "smile", token, ca="ca.pem") as client:
        head = Head.load("smile.onnx")
        for prediction in client.predictions(head, follow=True):
            print(prediction.sequence, prediction.label, prediction.probability)

Features have numbers that rise. The client asks for what comes after the last one that it handed out, so that after an
outage it goes on where it was: nothing twice, and nothing left out that the producer still keeps. A head whose task is
a map, and no class, gives maps: `EdgeClient.maps` in place of `EdgeClient.predictions`.

Axes: N features, C channels, H and W.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve.codec import CodecError, Precision, decode, media_type
from serve.edge.card import HeadCard
from serve.edge.cursor import Cursor
from serve.edge.errors import AnswerError, NotServedError, VersionMismatchError
from serve.edge.head import Head
from serve.edge.link import Link, Patience, Received
from tasks.errors import ConfigError

NOTHING = 204
_MOST_BYTES = 1 << 28
"""Of one answer, unpacked."""
_WAIT_S = 20.0
"""How long the server may hold a request while there is nothing new."""
_MARGIN_S = 15.0
"""What the client waits longer than that."""


@dataclass(frozen=True)
class Features:
    """Some of a task's features, of one version, in their order."""

    task: str
    version: str
    z: NDArray[np.float32] = field(repr=False)
    """(N, C, H, W)."""
    sequence: tuple[int, ...]
    time_ms: tuple[int, ...]
    """When each was published: milliseconds since 1970, UTC."""
    last: int
    """The number to go on after."""
    oldest: int
    """The lowest number that the producer still keeps."""


@dataclass(frozen=True)
class Prediction:
    """What the head says of one feature."""

    sequence: int
    time_ms: int
    version: str
    label: str
    probability: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class MapPrediction:
    """The map that the head makes of one feature."""

    sequence: int
    time_ms: int
    version: str
    map: NDArray[np.float32] = field(repr=False)
    """(C, H, W), as `Head.maps` has it."""


T = TypeVar("T")
Others = Callable[[float, str], None]
"""Told (the share of features that are of the head's version, and the version that is served) when that changes: the
others are passed over. A share of 0: none is, for as long as that is so."""
Gap = Callable[[int, int], None]
"""Told (the number that was handed out last, the lowest that is still kept) when features were lost in between."""


@dataclass(frozen=True)
class _Places:
    """Where in the stream to begin and to end, and who is told what."""

    after: int
    follow: bool
    limit: int
    state: str | Path | None
    on_gap: Gap | None
    on_others: Others | None


class _Served:
    """Whether the head's version is served: tells of what changes, and gives up when it was not for too long."""

    def __init__(self, link: Link, card: HeadCard, places: _Places) -> None:
        self._link, self._card, self._places = link, card, places
        self.share, self._version = 1.0, card.version
        self._at, self._attempt = link.clock(), 0

    def seen(self) -> None:
        """A feature of it came."""
        self._at, self._attempt = self._link.clock(), 0

    def look(self, share: float, version: str) -> None:
        """None came, and this is what the server says. Raises `VersionMismatchError`; else waits, where that helps."""
        patience_s = self._link.patience.total_s
        if share > 0:
            self.seen()
        elif not self._places.follow or (patience_s is not None and self._link.clock() - self._at >= patience_s):
            raise VersionMismatchError(self._card.task, self._card.version, version)
        if (share, version) != (self.share, self._version):
            self.share, self._version = share, version
            if self._places.on_others is not None:
                self._places.on_others(share, version)
        if share == 0:
            self._link.pause(self._attempt)
            self._attempt += 1


class EdgeClient:
    """One task of one server, for the holder of one token. A context manager; for one thread."""

    def __init__(
        self,
        url: str,
        task: str,
        token: str,
        *,
        precision: Precision = "fp16",
        ca: str | Path | None = None,
        plain_http: bool = False,
        timeout_s: float = 30.0,
        patience: Patience = Patience(),  # noqa: B008 - frozen
        link: Link | None = None,
    ) -> None:
        """``ca``: file of the authority that signed the server's certificate. ``link`` stands in for all of that."""
        self.task, self._precision = task, precision
        self._link = link or Link(
            url, token, ca=ca, plain_http=plain_http, timeout_s=max(timeout_s, _WAIT_S + _MARGIN_S), patience=patience
        )

    def __enter__(self) -> EdgeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._link.close()

    def metadata(self, *, version: str | None = None) -> dict[str, Any]:
        """What the producer says of the feature: shape, version, guarantee, measured leakage.

        Of the version that is served, unless another one is named that is tried on a share of the images.
        """
        params = {} if version is None else {"version": version}
        try:
            found = json.loads(self._link.request("GET", self._path("metadata"), params=params).body)
        except ValueError as error:
            raise AnswerError("the server's metadata is no JSON") from error
        if not isinstance(found, dict):
            raise AnswerError("the server's metadata is no JSON object")
        return found

    def latest(self, *, version: str | None = None) -> Features | None:
        """The newest feature; None if there is none."""
        return self._features("features/latest", {} if version is None else {"version": version})

    def features(
        self, *, after: int = 0, limit: int = 16, version: str | None = None, wait_s: float = 0.0
    ) -> Features | None:
        """At most ``limit`` features with numbers above ``after``; None if there are none within ``wait_s``."""
        params: dict[str, Any] = {"after": after, "limit": limit}
        if version is not None:
            params["version"] = version
        if wait_s > 0:
            params["wait"] = f"{wait_s:g}"
        return self._features("features", params)

    def predictions(
        self,
        head: Head,
        *,
        after: int = 0,
        follow: bool = False,
        limit: int = 16,
        state: str | Path | None = None,
        on_gap: Gap | None = None,
        on_others: Others | None = None,
    ) -> Iterator[Prediction]:
        """What the head says of every feature with a number above ``after``: each once.

        Ends with the last one that is there; with ``follow`` it waits for the next, through outages of the server, for
        as long as the client's patience. ``state`` is a file that remembers the last number that was handed out, so
        that another process goes on there. Features of other versions than the head's are passed over. Raises
        `VersionMismatchError` when the head's is not served, to any share of the images: at once, or with ``follow``
        when that has been so for as long as the client's patience. Raises `ConfigError` for a head of another task, or
        one that answers with maps.
        """
        if head.card.answer_shape is not None:
            raise ConfigError(f"the head of task {head.card.task!r} answers with a map: ask for its maps")
        places = _Places(after, follow, limit, state, on_gap, on_others)
        for found, i, answer in self._each(head, head.answers, places):
            yield Prediction(
                sequence=found.sequence[i],
                time_ms=found.time_ms[i],
                version=found.version,
                label=answer.label,
                probability=answer.probability,
                probabilities=answer.probabilities,
            )

    def maps(
        self,
        head: Head,
        *,
        after: int = 0,
        follow: bool = False,
        limit: int = 16,
        state: str | Path | None = None,
        on_gap: Gap | None = None,
        on_others: Others | None = None,
    ) -> Iterator[MapPrediction]:
        """`predictions` of a head that answers with maps. Raises `ConfigError` for one that answers with classes."""
        if head.card.answer_shape is None:
            raise ConfigError(f"the head of task {head.card.task!r} answers with a class: ask for its predictions")
        places = _Places(after, follow, limit, state, on_gap, on_others)
        for found, i, answer in self._each(head, lambda z: list(head.maps(z)), places):
            yield MapPrediction(sequence=found.sequence[i], time_ms=found.time_ms[i], version=found.version, map=answer)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _each(
        self, head: Head, answers: Callable[[NDArray[np.float32]], Sequence[T]], places: _Places
    ) -> Iterator[tuple[Features, int, T]]:
        """Features, the place of one in them, and the answer to it: it counts as handed out when the next is asked."""
        card = head.card
        if card.task != self.task:
            raise ConfigError(f"the head is of task {card.task!r}, and features of task {self.task!r} were asked for")
        cursor = Cursor.open(places.state, self._link.url, self.task, places.after)
        served = _Served(self._link, card, places)
        while True:
            missing: NotServedError | None = None
            found: Features | None = None
            try:
                found = self.features(
                    after=cursor.after,
                    limit=places.limit,
                    version=card.version,
                    wait_s=_WAIT_S if places.follow else 0.0,
                )
            except NotServedError as error:  # the server may have the task, and not this version of it
                missing = error
            if found is None:
                served.look(*self._share(card.version))
                if missing is not None and served.share > 0:
                    raise missing
                if not places.follow:
                    return
                continue
            served.seen()
            if found.version != card.version:
                raise VersionMismatchError(self.task, card.version, found.version)
            if places.on_gap is not None and 0 < cursor.after < found.oldest - 1:
                places.on_gap(cursor.after, found.oldest)
            for i, answer in enumerate(answers(found.z)):
                if found.sequence[i] <= cursor.after:
                    continue
                yield found, i, answer
                cursor.move(found.sequence[i])
            cursor.move(max(cursor.after, found.last))

    def _path(self, name: str) -> str:
        return f"/tasks/{self.task}/{name}"

    def _share(self, version: str) -> tuple[float, str]:
        """Of the features, how many are of that version, 0 to 1; and the version that is told to who names none."""
        try:
            found = self.metadata(version=version)
        except NotServedError:
            found = {}
        if found.get("version") == version:
            share = found.get("share", 1.0)
            if not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise AnswerError("the server's metadata has a share that is none")
            return float(share), version
        return 0.0, str(self.metadata().get("version"))

    def _features(self, name: str, params: dict[str, Any]) -> Features | None:
        headers = {"Accept": media_type(self._precision)}
        received = self._link.request("GET", self._path(name), params=params, headers=headers, max_bytes=_MOST_BYTES)
        return None if received.status == NOTHING else self._read(received)

    def _read(self, received: Received) -> Features:
        try:
            arrays, text = decode(received.body, max_bytes=_MOST_BYTES, max_values=_MOST_BYTES // 2, finite=True)
            found = Features(
                task=text["task"],
                version=text["version"],
                z=arrays["z"],
                sequence=tuple(int(n) for n in arrays["sequence"]),
                time_ms=tuple(int(t) for t in arrays["time_ms"]),
                last=int(text["last"]),
                oldest=int(text["oldest"]),
            )
        except (CodecError, KeyError, ValueError, TypeError) as error:
            raise AnswerError(f"the server's features cannot be read ({error}): is it another program?") from error
        n = len(found.sequence)
        if found.task != self.task or found.z.ndim < 2 or len(found.z) != n or len(found.time_ms) != n:
            raise AnswerError(f"the server's features are not of task {self.task!r}, or not whole")
        numbers = (*found.sequence, found.last + 1)
        if any(numbers[i] >= numbers[i + 1] for i in range(n)):
            raise AnswerError("the numbers of the server's features do not rise")
        return found
