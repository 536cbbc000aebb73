"""What one task's endpoint does, whatever carries HTTP and whatever runs the network: admit, infer, charge, release.

Nothing is released before it is charged, and nothing is done before the gate has admitted it. What writes to a disk, or
takes longer than a thread takes to be woken, runs in threads. What devices publish is computed, charged, stored and
written down by one of them, all that is there at once: an image wakes one thread, and the disk is asked as often for
ten images as for one. A device that publishes alone does not wait for a thread to wake, where its image takes less.

Axes: N features, C channels, H and W.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import DataError, NonFiniteFeatureError
from orchestrator.privacy.bounded.keyed_noise import ImageDigests, NoiseKey, release_digests
from serve.batches import Batches
from serve.codec import CodecError, Encoding, Precision, compress, encode, media_type, negotiate
from serve.model import MAX_PIXELS, Features, ModuleModel
from serve.ports import Encode, Infer, Meter
from serve.problems import Problem, busy, no_such_task
from serve.streams import FeatureStore, NewFeature, StoredFeature, VersionTerms
from serve.tenants.gate import Admission, Denial, Gate, Verb

STREAM_TYPE: Final = "application/x-safetensors-stream"
LATEST: Final = "latest"
"""Another word for no version in particular."""
_POLL_S: Final = 0.05
"""How often a waiting reader looks at the store: another replica may have published."""
_ALONE_S: Final = 0.1
"""For which nobody else has published when a device is said to publish alone."""
_LENGTH_BYTES: Final = 4
_SMALL_BYTES, _SMALL_PIXELS = 32 << 10, 64 * 64
"""An image that is no larger is decoded in the time that it takes to wake a thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceLimits:
    """What one request may cost."""

    max_body_bytes: int = 8 << 20
    """Of an encoded image."""
    max_pixels: int = MAX_PIXELS
    """Of the image in it."""
    body_s: float = 10.0
    """In which a body must have come."""
    infer_s: float = 20.0
    """In which its feature must be there."""
    max_inflight: int = 64
    """Images at once in one replica; the next ones are told to come again."""
    max_batch: int = 16
    """Images that are computed at once."""
    batch_wait_s: float = 0.0
    """For which a batch that is not full waits to be."""
    max_page: int = 64
    """Features in one body."""
    max_page_bytes: int = 32 << 20
    """Of these features, as float32."""
    max_wait_s: float = 20.0
    """For which a reader may wait for the next feature."""
    stream_s: float = 30.0
    """After which a stream ends, to be asked for again."""
    heartbeat_s: float = 5.0
    """Between two signs of life on a stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """One version that answers."""

    module: ModuleModel
    infer: Infer
    """Of pixels, or of u where there is ``encode``."""
    encode: Encode | None = None
    """Where the encoder is elsewhere."""

    @property
    def version(self) -> str:
        """Its name."""
        return self.module.card.version


@dataclass(frozen=True, kw_only=True, slots=True)
class Lanes:
    """The version that is served, and perhaps another one that a share of the images is tried on."""

    current: Lane
    canary: Lane | None = None
    share: float = 0.0
    """Of images that go to the canary, between 0 and 1."""

    def __post_init__(self) -> None:
        assert 0 <= self.share <= 1, "checked where it is set"

    def lane_of(self, image: bytes) -> Lane:
        """By its bytes: the same file always goes the same way, in every replica, so it is not told in two versions."""
        if self.canary is None:
            return self.current
        place = int.from_bytes(hashlib.sha256(b"canary" + image).digest()[:8], "big") / 2**64
        return self.canary if place < self.share else self.current

    def all(self) -> tuple[Lane, ...]:
        """Both."""
        return (self.current,) if self.canary is None else (self.current, self.canary)

    def shares(self) -> tuple[tuple[Lane, float], ...]:
        """Each with its share of the images."""
        if self.canary is None:
            return ((self.current, 1.0),)
        return (self.current, 1 - self.share), (self.canary, self.share)


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """In which form a client takes its answer."""

    precision: Precision
    encoding: Encoding

    @classmethod
    def of(cls, accept: str, accept_encoding: str) -> Form:
        """Of the request's headers. Raises `Problem` 406."""
        try:
            precision, encoding = negotiate(accept, accept_encoding)
        except CodecError as error:
            raise Problem(HTTPStatus.NOT_ACCEPTABLE, "nothing that is accepted is here", str(error)) from None
        return cls(precision=precision, encoding=encoding)


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A body of features of one version."""

    body: bytes = field(repr=False)
    form: Form
    version: str
    first: int
    last: int
    features: int

    @property
    def numbers(self) -> str:
        """Which features of the stream they are, in words."""
        return f"{self.first}-{self.last} of version {self.version}"

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        headers = {"Content-Type": media_type(self.form.precision), "X-Feature-Version": self.version}
        return headers if self.form.encoding == "identity" else {**headers, "Content-Encoding": self.form.encoding}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Publication:
    """An image whose feature a device is to be told."""

    admission: Admission
    form: Form
    lane: Lane
    given: NDArray[Any]
    """Pixels, or u."""
    digest: bytes
    claim: Future[None] = field(default_factory=Future)
    """Runs from when it is charged on; cancelled if nobody waits for it by then."""

    @property
    def sampled_once(self) -> bool:
        """Whether its noise is always the same, so that it is not computed twice."""
        release = self.lane.module.release
        return release is not None and not release.fresh


class TaskService:
    """The endpoint of one task. Its methods raise `Problem`, `Refused`, or what `problem_of` makes of an error."""

    def __init__(
        self,
        task: str,
        lanes: Lanes,
        *,
        store: FeatureStore,
        gate: Gate,
        meter: Meter,
        noise_key: NoiseKey | None = None,
        limits: ServiceLimits = ServiceLimits(),
        leakage: Mapping[str, Any] | None = None,
    ) -> None:
        """``leakage`` is what was measured, by version; ``noise_key`` belongs to bounded features, of any version."""
        self.task, self.lanes, self.limits, self.meter = task, lanes, limits, meter
        self._store, self._gate, self._key, self._leakage = store, gate, noise_key, leakage or {}
        self._publications = Batches(
            self._publish_all, name="publications", max_batch=limits.max_batch, wait_s=limits.batch_wait_s
        )
        self._inflight = 0
        self._met = 0.0
        for lane in lanes.all():
            store.remember(_terms(lane.module))

    def check(self) -> None:
        """Raise where the stream cannot be read or the thread of publications is stuck."""
        self._store.bounds()
        self._publications.check()

    async def admit(self, authorization: str | None, verb: Verb, *, features: int = 0) -> Admission:
        """Let a request in. Raises `Refused`."""
        decided = self._gate.decide(authorization, task=self.task, verb=verb, features=features)
        if isinstance(decided, Denial):
            raise await asyncio.to_thread(self._gate.write_down, decided)
        return decided

    async def audit(self, admission: Admission, verb: Verb, outcome: int) -> None:
        """Write down what came of it, unless features were released: whoever released them wrote it down."""
        await asyncio.to_thread(self._gate.audit, admission, task=self.task, verb=verb, outcome=outcome)

    # -- publishing ----------------------------------------------------------------------------------------------------

    async def publish(self, admission: Admission, form: Form, receive: Callable[[], Awaitable[bytes]]) -> Page:
        """The feature of the image that ``receive`` gives, appended to the stream."""
        if self._inflight >= self.limits.max_inflight:
            raise busy()
        self._inflight += 1
        if self._inflight > 1:
            self._met = time.monotonic()
        try:
            image = await receive()
            return await self._published(admission, form, image)
        finally:
            self._inflight -= 1

    async def _published(self, admission: Admission, form: Form, image: bytes) -> Page:
        lane = self.lanes.lane_of(image)
        pixels, digest = await self._decoded(lane, image)
        one = _Publication(admission=admission, form=form, lane=lane, given=pixels, digest=digest)
        answer = None
        try:
            async with asyncio.timeout(self.limits.infer_s):
                if lane.encode is not None:
                    one = replace(one, given=await lane.encode(pixels, digest))
                answer = self._publications.do(one, here=await self._is_alone())
                return await asyncio.shield(answer)
        except TimeoutError:
            if answer is None or one.claim.cancel():
                raise busy() from None
            return await answer  # it is charged already
        finally:
            one.claim.cancel()
            if answer is not None:
                answer.cancel()

    async def _is_alone(self) -> bool:
        """Whether nobody else has been publishing lately, nor came with this one: that is begun before it is said."""
        for _ in range(3):  # the loop looks for what came, reads it, and begins it
            if time.monotonic() - self._met < _ALONE_S:
                return False
            await asyncio.sleep(0)
        return self._inflight == 1

    async def _decoded(self, lane: Lane, image: bytes) -> tuple[NDArray[np.uint8], bytes]:
        if len(image) <= _SMALL_BYTES:
            with suppress(Problem):  # too many pixels for here, or none at all: said below
                return _decoded(lane, image, min(_SMALL_PIXELS, self.limits.max_pixels))
        return await asyncio.to_thread(_decoded, lane, image, self.limits.max_pixels)

    def _publish_all(self, publications: list[_Publication]) -> list[Page | Exception]:
        """Compute, charge, store and write down together; what cannot be computed or charged spoils no other."""
        found = self._charged_features(publications, self._inferred(publications))
        charged = [(one, z) for one, z in zip(publications, found, strict=True) if not isinstance(z, Exception)]
        stored = self._store.append([NewFeature(version=one.lane.version, image=one.digest, z=z) for one, z in charged])
        oldest, _ = self._store.bounds()
        pages = [
            self._page(one.admission, one.form, [feature], oldest)
            for (one, _), feature in zip(charged, stored, strict=True)
        ]
        self._gate.audit_releases(
            [(one.admission, page.numbers) for (one, _), page in zip(charged, pages, strict=True)]
        )
        told = iter(pages)
        return [z if isinstance(z, Exception) else next(told) for z in found]

    def _charged_features(
        self, publications: Sequence[_Publication], found: Sequence[Features | Exception]
    ) -> list[Features | Exception]:
        """What may be told; in place of the others, why not. What nobody waits for any more is not charged.

        The producer's own device has the image: it is told nothing, so no bits are spent. Readers spend them.
        """
        told, asked = list(found), dict[int, _Publication]()
        for i, one in enumerate(publications):
            if isinstance(told[i], Exception):
                continue
            if one.claim.set_running_or_notify_cancel():
                asked[i] = one
            else:
                told[i] = busy()
        refused: Sequence[Exception | None]
        try:
            refused = self._gate.charge_each([(one.admission, one.lane.version) for one in asked.values()])
        except Exception as error:
            refused = [error] * len(asked)
        for i, refusal in zip(asked, refused, strict=True):
            if refusal is not None:
                told[i] = refusal
        return told

    def _inferred(self, publications: Sequence[_Publication]) -> list[Features | Exception]:
        """A feature each, or why there is none. What is sampled once is taken from the stream, if it is there.

        The last digit of s may differ from one batch to another, and with it the grid point.
        """
        names = [(one.lane.version, one.digest if one.sampled_once else i) for i, one in enumerate(publications)]
        asked = dict(zip(names, publications, strict=True))
        found: dict[tuple[str, bytes | int], Features | Exception] = {
            name: z
            for name, one in asked.items()
            if one.sampled_once and (z := self._store.find(one.lane.version, one.digest)) is not None
        }
        for lane in self.lanes.all():
            new = {name: one for name, one in asked.items() if one.lane is lane and name not in found}
            found |= zip(new, _features(lane, list(new.values())), strict=True)
        return [found[name] for name in names]

    # -- reading -------------------------------------------------------------------------------------------------------

    async def latest(self, admission: Admission, form: Form, version: str | None) -> Page | None:
        """The newest feature; None if there is none."""
        return await asyncio.to_thread(self._latest, admission, form, version)

    async def after(
        self, admission: Admission, form: Form, *, sequence: int, limit: int, wait_s: float, version: str | None
    ) -> Page | None:
        """The next features after a number, of one version; None if none has come within ``wait_s``."""
        deadline = time.monotonic() + min(wait_s, self.limits.max_wait_s)
        while True:
            page = await asyncio.to_thread(self._written_after, admission, form, sequence, limit, version)
            if page is not None or time.monotonic() >= deadline:
                return page
            await asyncio.sleep(_POLL_S)

    async def check_version(self, version: str | None) -> None:
        """Raise `Problem` for a version that never was, before the first byte of a stream is out."""
        await asyncio.to_thread(self._checked, version)

    async def stream(
        self, admission: Admission, form: Form, *, sequence: int, version: str | None
    ) -> AsyncIterator[bytes]:
        """Length-prefixed bodies as features come, and empty ones as signs of life; ends by itself."""
        ends, beat = time.monotonic() + self.limits.stream_s, time.monotonic()
        while (now := time.monotonic()) < ends:
            page = await asyncio.to_thread(self._after, admission, form, sequence, self.limits.max_page, version)
            if page is not None:
                sequence = page.last
            elif now - beat < self.limits.heartbeat_s:
                await asyncio.sleep(_POLL_S)
                continue
            else:
                await asyncio.to_thread(admission.recheck)
            body = b"" if page is None else page.body
            beat = now
            yield len(body).to_bytes(_LENGTH_BYTES, "big") + body

    def _latest(self, admission: Admission, form: Form, version: str | None) -> Page | None:
        found = self._store.latest(self._checked(version))
        return None if found is None else self._written(admission, self._charged(admission, form, [found]))

    def _written_after(
        self, admission: Admission, form: Form, sequence: int, limit: int, version: str | None
    ) -> Page | None:
        page = self._after(admission, form, sequence, limit, version)
        return None if page is None else self._written(admission, page)

    def _after(self, admission: Admission, form: Form, sequence: int, limit: int, version: str | None) -> Page | None:
        found = self._store.after(sequence, min(limit, self.limits.max_page), self._checked(version))
        fitting = max(1, self.limits.max_page_bytes // max(1, found[0].z.nbytes)) if found else 0
        return self._charged(admission, form, found[:fitting]) if found else None

    def _charged(self, admission: Admission, form: Form, found: Sequence[StoredFeature]) -> Page:
        """What is about to be told to a tenant, after it is booked."""
        terms = self._store.terms(found[0].version)
        digests: Sequence[bytes] = ()
        if terms.bits is not None:
            assert self._key is not None and terms.noise_version is not None, "a bounded version has a noise key"
            images = ImageDigests(tuple(_release_of(feature, fresh=terms.fresh) for feature in found))
            digests = release_digests(
                self._key, tenant=admission.tenant, task=self.task, version=terms.noise_version, images=images
            )
        admission.charge(digests, terms.version, terms.bits, False, len(found))
        oldest, _ = self._store.bounds()
        return self._page(admission, form, found, oldest)

    def _written(self, admission: Admission, page: Page) -> Page:
        """In the audit log."""
        self._gate.audit_releases([(admission, page.numbers)])
        return page

    def _page(self, admission: Admission, form: Form, found: Sequence[StoredFeature], oldest: int) -> Page:
        first, last, version = found[0].sequence, found[-1].sequence, found[0].version
        arrays: dict[str, NDArray[Any]] = {
            "z": np.stack([feature.z for feature in found]),
            "sequence": np.array([feature.sequence for feature in found], np.int64),
            "time_ms": np.array([feature.time_ms for feature in found], np.int64),
        }
        metadata = {"task": self.task, "version": version, "last": str(last), "oldest": str(oldest)}
        body = compress(encode(arrays, precision=form.precision, metadata=metadata), form.encoding)
        self.meter.released(
            tenant=admission.tenant, task=self.task, version=version, features=len(found), size_bytes=len(body)
        )
        return Page(body=body, form=form, version=version, first=first, last=last, features=len(found))

    # -- saying what it is ---------------------------------------------------------------------------------------------

    def metadata(self, version: str | None = None) -> dict[str, Any]:
        """What a tenant is told of a version that is served: the current one, or the canary by its name."""
        for lane, share in self.lanes.shares():
            if version in {None, LATEST, lane.version}:
                return {**lane.module.card.to_json(), "share": share, "leakage": self._leakage.get(lane.version)}
        raise no_such_task()

    def _checked(self, version: str | None) -> str | None:
        """None for any. A version that never was looks like a task that is not there."""
        if version is None or version == LATEST:
            return None
        if not self._store.knows(version):
            raise no_such_task()
        return version


def _decoded(lane: Lane, image: bytes, max_pixels: int) -> tuple[NDArray[np.uint8], bytes]:
    """(pixels, digest) of an encoded image. Raises `Problem`."""
    try:
        pixels = lane.module.pixels(image, max_pixels=max_pixels)
    except DataError as error:
        title = "the body is no image that can be used"
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, title, str(error)) from None
    return pixels, ImageDigests.of(pixels[None]).sha256[0]


def _features(lane: Lane, publications: Sequence[_Publication]) -> list[Features | Exception]:
    """Computed at once; one by one where one of them has none, so that it spoils no other."""
    if not publications:
        return []
    digests = ImageDigests(tuple(one.digest for one in publications))
    try:
        return list(lane.infer(np.stack([one.given for one in publications]), digests))
    except NonFiniteFeatureError as error:
        if len(publications) == 1:
            return [error]
        return [z for one in publications for z in _features(lane, [one])]
    except Exception as error:  # of this version alone
        return [error] * len(publications)


def _release_of(feature: StoredFeature, *, fresh: bool) -> bytes:
    """What is charged once: the image, whose noise is always the same; with fresh noise, this draw of it.

    So what is read again costs nothing, and an image that is published again costs again where its noise is fresh.
    """
    if not fresh:
        return feature.image
    return hashlib.sha256(feature.image + feature.sequence.to_bytes(8, "big")).digest()


def _terms(module: ModuleModel) -> VersionTerms:
    release = module.release
    return VersionTerms(
        version=module.card.version,
        bits=None if release is None else release.channel.bits_per_image,
        noise_version=None if release is None else release.version,
        fresh=release is not None and release.fresh,
    )
