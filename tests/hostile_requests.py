"""Requests of somebody who means harm, and what has to be true of every answer. A seed gives the same again.

    for attack in attacks(target, seed=0):
        check(attack, await answered(app, attack))

`answered` calls the app as a server would, so that bodies, headers and paths may be anything; `check` raises for a
status that says that something broke, and for words that tell what is inside.
"""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import zstandard
from PIL import Image

from serve.codec import encode

ANSWERS: Final = frozenset({200, 204, 400, 401, 403, 404, 405, 406, 408, 409, 413, 415, 422, 429, 503})
_INSIDE: Final = re.compile(
    rb"Traceback|File \"|\.py\b|site-packages|/tmp|/home|/root|/usr|/work|/var|<class|<built-in|object at 0x"
    rb"|0x[0-9a-f]{6}|[A-Z][A-Za-z]+(Error|Exception|Warning)\b|sqlite|SELECT |torch|numpy|_io\."
    rb"|BytesIO|pydantic|starlette|fastapi"
    rb"|uvicorn|PIL\b|Pillow|SafetensorError|tests?\b"
)
_PROBLEM: Final = {"status", "title", "detail"}


@dataclass(frozen=True, slots=True)
class Attack:
    """One request."""

    name: str
    method: str
    path: bytes
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    chunks: tuple[bytes, ...] = (b"",)
    pause_s: float = 0.0
    """Before every chunk but the first."""
    hangs_up: bool = False
    """Instead of sending the last chunk."""


@dataclass(slots=True)
class Answer:
    """What came back."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)


async def answered(app: Any, attack: Attack) -> Answer:
    """Call the app as a server does."""
    answer, sent = Answer(), iter(range(len(attack.chunks)))
    done = asyncio.Event()

    async def receive() -> dict[str, Any]:
        place = next(sent, None)
        if place is None:
            await done.wait()
            return {"type": "http.disconnect"}
        if place and attack.pause_s:
            await asyncio.sleep(attack.pause_s)
        last = place == len(attack.chunks) - 1
        if last and attack.hangs_up:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": attack.chunks[place], "more_body": not last}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.lower(): value for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": ""},
        **{"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "method": attack.method},
        **{"path": _unquoted(attack.path), "raw_path": attack.path, "query_string": attack.query},
        "headers": [(b"host", b"task"), *attack.headers],
    }
    try:
        await app(scope, receive, send)
    finally:
        done.set()
    return answer


def check(attack: Attack, answer: Answer) -> None:
    """Raises `AssertionError`: nothing broke, and nothing was told."""
    body = bytes(answer.body)
    allowed = ANSWERS | {499} if attack.hangs_up else ANSWERS
    assert answer.status in allowed, (attack.name, answer.status, body[:300], attack)
    if answer.status >= 400 and body:
        assert answer.headers[b"content-type"] == b"application/problem+json", (attack.name, body[:300])
        told = json.loads(body)
        assert told.keys() <= _PROBLEM and told["status"] == answer.status, (attack.name, told)
        assert (found := _INSIDE.search(body)) is None, (attack.name, found, body)
        assert len(body) < 1000, (attack.name, body)
    for name, value in answer.headers.items():
        assert _INSIDE.search(value) is None, (attack.name, name, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is attacked."""

    open: Sequence[tuple[str, bytes, bytes]]
    """(method, path, Authorization) that are let in: most attacks are of somebody who is."""
    paths: Sequence[bytes]
    tokens: Sequence[bytes]
    """Values of Authorization."""
    good: bytes
    """A body that is taken, to be bent."""
    slow_s: float
    """Longer than a body may take."""


def attacks(target: Target, *, seed: int) -> Iterator[Attack]:
    """Without end."""
    rng = random.Random(seed)
    bodies = Bodies(rng, target.good)
    while True:
        yield _attack(rng, bodies, target)


class Bodies:
    """Bodies that do harm to somebody: to decoders, to memory, to whoever unpickles."""

    def __init__(self, rng: random.Random, good: bytes) -> None:
        self._rng, self._good = rng, good
        self.makers: list[Callable[[], bytes]] = [
            *(self.noise, self.truncated, self.bent, self.bent, self.bent, self.spliced, self.pickled, self.array),
            *(self.tensors, self.tensor_header, self.nan, self.png_bomb, self.gif_bomb, self.bmp_bomb, self.text_bomb),
            *(self.zstd_bomb, self.deflate_bomb, self.odd_picture, self.tiff, self.animation, self.script, self.nested),
        ]
        self._pictures = {kind: _picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}

    def noise(self) -> bytes:
        return self._rng.randbytes(self._rng.choice([0, 1, 7, 64, 5000]))

    def truncated(self) -> bytes:
        body = self._any()
        return body[: self._rng.randrange(len(body))]

    def bent(self) -> bytes:
        body = bytearray(self._any())
        for _ in range(self._rng.choice([1, 2, 10, 50])):
            body[self._rng.randrange(len(body))] = self._rng.randrange(256)
        return bytes(body)

    def spliced(self) -> bytes:
        one, two = self._any(), self._any()
        return one[: self._rng.randrange(len(one))] + two[self._rng.randrange(len(two)) :]

    def pickled(self) -> bytes:
        protocol = self._rng.choice([0, 2, 4, 5])
        return pickle.dumps(_Harm(), protocol) + self._rng.choice([b"", self._good])

    def array(self) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, np.array([_Harm()], dtype=object) if self._rng.random() < 0.5 else np.zeros(9), True)
        return buffer.getvalue()

    def tensors(self) -> bytes:
        """Of a safetensors file, whole or not."""
        shape = self._rng.choice([(1, 64, 4, 4), (0,), (1, 1), (3, 1000)])
        body = encode({"z": np.full(shape, self._rng.choice([0.0, 1e38, -1e-45]), np.float32)}, precision="fp32")
        return body[: self._rng.choice([len(body), 8, 7, len(body) // 2, len(body) - 1])]

    def tensor_header(self) -> bytes:
        shape = self._rng.choice([[2**62], [-1], [2**31, 2**31, 2**31], ["x"], [1] * 5000, [1.5], None])
        offsets = self._rng.choice([[0, 4], [4, 0], [0, 2**63], [-4, 0], []])
        spec = {"dtype": self._rng.choice(["F32", "F64", "BF16", "", None]), "shape": shape, "data_offsets": offsets}
        header = json.dumps(
            {"z": spec, "__metadata__": self._rng.choice([{}, {"message": "{}"}, {"a": 1}, []])}
        ).encode()
        length = self._rng.choice([len(header), 2**63, 2**64 - 1, 0, len(header) + 1])
        return struct.pack("<Q", length) + header + bytes(4)

    def nan(self) -> bytes:
        value = self._rng.choice([np.nan, np.inf, -np.inf])
        if self._rng.random() < 0.5:
            return encode({"gradient": np.full((2, 64, 4, 4), value, np.float32)}, precision="fp32")
        buffer = io.BytesIO()
        Image.fromarray(np.full((16, 16), value, np.float32)).save(buffer, "TIFF")
        return buffer.getvalue()

    def png_bomb(self) -> bytes:
        """Few bytes that say that they are many pixels, or are that many."""
        side = self._rng.choice([2**31 - 1, 65_535, 20_000, 4000])
        depth, colour = self._rng.choice([(8, 2), (16, 6), (1, 0), (8, 3), (3, 9)])
        header = struct.pack(">IIBBBBB", side, self._rng.choice([side, 1, 0]), depth, colour, 0, 0, 0)
        return _png(header, zlib.compress(bytes(1_000_000), 9))

    def gif_bomb(self) -> bytes:
        body = bytearray(self._pictures["GIF"])
        body[6:10] = struct.pack("<HH", self._rng.choice([65_535, 9999]), self._rng.choice([65_535, 1]))
        return bytes(body)

    def bmp_bomb(self) -> bytes:
        body = bytearray(self._pictures["BMP"])
        body[18:26] = struct.pack(
            "<ii", self._rng.choice([2**31 - 1, -1, 40_000]), self._rng.choice([-(2**31), 40_000])
        )
        return bytes(body)

    def text_bomb(self) -> bytes:
        """Texts in a picture that unpack to a hundred megabytes."""
        kind, packed = self._rng.choice([b"zTXt", b"iTXt", b"iCCP"]), zlib.compress(bytes(4_000_000), 9)
        text = b"a\0\0" + packed if kind != b"iTXt" else b"a\0\1\0\0\0" + packed
        header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
        return _png(header, zlib.compress(bytes(4)), *((kind, text) for _ in range(self._rng.choice([1, 25]))))

    def zstd_bomb(self) -> bytes:
        return _ZSTD_BOMB

    def deflate_bomb(self) -> bytes:
        return _DEFLATE_BOMB[self._rng.choice([0, 2]) :]

    def odd_picture(self) -> bytes:
        mode, kind = self._rng.choice(
            [
                ("CMYK", "JPEG"),
                ("I;16", "PNG"),
                ("1", "TIFF"),
                ("LA", "PNG"),
                ("P", "PNG"),
                ("F", "TIFF"),
                ("LAB", "TIFF"),
            ]
        )
        buffer = io.BytesIO()
        Image.new(mode, self._rng.choice([(1, 1), (1, 3000), (17, 3)])).save(buffer, kind)
        return buffer.getvalue()

    def tiff(self) -> bytes:
        """Tags that point anywhere."""
        body = bytearray(self._pictures["TIFF"])
        (start,) = struct.unpack_from("<I", body, 4)
        (n,) = struct.unpack_from("<H", body, start)
        place = start + 2 + 12 * self._rng.randrange(n)
        body[place + 4 : place + 12] = struct.pack("<II", *(self._rng.choice([0, 1, 2**31, 2**32 - 1]) for _ in "ab"))
        return bytes(body)

    def animation(self) -> bytes:
        buffer, kind = io.BytesIO(), self._rng.choice(["GIF", "WEBP", "TIFF", "PNG"])
        frames = [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(20)]
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        return buffer.getvalue()

    def script(self) -> bytes:
        return self._rng.choice(
            [
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
                b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
                b"<script>alert(1)</script>",
                b"{{7*7}}${jndi:ldap://127.0.0.1/a}",
                b"PK\x03\x04" + bytes(40),
                b"\x93NUMPY\x01\x00",
            ]
        )

    def nested(self) -> bytes:
        header = b'{"z":' + b"[" * 20_000
        return struct.pack("<Q", len(header)) + header

    def _any(self) -> bytes:
        return self._rng.choice([self._good, *self._pictures.values()])


class _Harm:
    """What runs where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, ("kill -9 $PPID",)


_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "get")
_VALUES: Final = (
    *(b"-1", b"0", b"1", b"9223372036854775807", b"9223372036854775808", b"1" + b"0" * 4000, b"1e400", b"nan", b"inf"),
    *(b"", b"%00", b"%ED%A0%80", b"%FF", b"'%20OR%20'1'='1", b"..%2F..%2Fetc%2Fpasswd", b"%F0%9F%92%A9", b"{}", b"[]"),
    *(b"%25n%25s", b"x" * 64, b"x" * 65, b"x" * 20_000, b"1&after=2", b"latest", b"2;drop%20table%20features"),
)
_HEADERS: Final[Sequence[tuple[bytes, Sequence[bytes]]]] = (
    (
        b"accept",
        (b"*/*;q=x", b"application/json", b"," * 5000, b";;;", b"application/x-safetensors;precision=fp99", b"\xff"),
    ),
    (b"accept-encoding", (b"zstd", b"zstd;q=nan", b"gzip", b"*", b"zstd," * 2000, b"\x80")),
    (b"content-type", (b"image/png", b"text/html", b"multipart/form-data", b"application/json", b"x" * 9000, b"\xe9")),
    (b"content-encoding", (b"gzip", b"zstd", b"br", b"identity", b"IDENTITY", b"zstd, zstd", b"x" * 9000)),
    (
        b"content-length",
        (b"0", b"5", b"999999999999999999999", b"-5", b"abc", b"\xb2", b"1" * 400, b"00010", b"8388609"),
    ),
    (b"transfer-encoding", (b"chunked", b"identity", b"gzip, chunked")),
    (b"range", (b"bytes=0-", b"bytes=0-0,0-0,0-0")),
    (b"expect", (b"100-continue", b"x")),
    (b"host", (b"evil.example", b"", b"[::1", b"task:99999")),
    (b"x-forwarded-for", (b"127.0.0.1", b"x" * 5000)),
    (b"x-forwarded-proto", (b"javascript",)),
    (b"forwarded", (b"for=_hidden;host=evil",)),
    (b"origin", (b"null", b"http://evil.example")),
    (b"if-none-match", (b"*",)),
    (b"cookie", (b"session=" + b"a" * 9000,)),
    (b"serve_multiplexed_model_id", (b"other",)),
    (b"x-request-id", (b"a\tb", b"x" * 3000)),
)


def _attack(rng: random.Random, bodies: Bodies, target: Target) -> Attack:
    maker = rng.choice(bodies.makers)
    body = maker()
    if rng.random() < 0.7:
        method, path, token = rng.choice(target.open)
    else:
        method, path, token = (
            rng.choice(["POST", "GET", *_METHODS]),
            rng.choice(target.paths),
            rng.choice(target.tokens),
        )
        path += rng.choice(
            [b"", b"", b"", b"/", b"/..", b"//x", b"%00", b"%ff", b"/" + b"a" * 3000, b"?", b"/\xc3\xa9"]
        )
    names = (b"after", b"limit", b"wait", b"version", b"x" * rng.choice([1, 500]))
    query = b"&".join(rng.choice(names) + b"=" + rng.choice(_VALUES) for _ in range(rng.choice([0, 0, 1, 2, 50])))
    headers = [(b"authorization", token)] if token else []
    for _ in range(rng.choice([0, 0, 0, 1, 2, 5])):
        name, values = rng.choice(_HEADERS)
        headers.append((name, rng.choice(values)))
    chunks, pause_s, hangs_up = (body,), 0.0, False
    manner = rng.random()
    if manner < 0.01:
        chunks, pause_s = (body[:5], body[5:10], body[10:]), target.slow_s
    elif manner < 0.04:
        chunks = (bytes(1 << 16),) * rng.choice([5, 20, 60])
    elif manner < 0.08:
        chunks = tuple(body[i : i + 1] for i in range(min(200, len(body)))) or (b"",)
    elif manner < 0.12:
        chunks, hangs_up = (body, b""), True
    return Attack(maker.__name__, method, path, query, tuple(headers), chunks, pause_s, hangs_up)


def _unquoted(path: bytes) -> str:
    from urllib.parse import unquote

    return unquote(path.decode("latin-1"))


def _png(header: bytes, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    chunks = [(b"IHDR", header), *more, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 12, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


_ZSTD_BOMB: Final = zstandard.ZstdCompressor(level=19).compress(bytes(200_000_000))
_DEFLATE_BOMB: Final = zlib.compress(bytes(50_000_000), 9)
