"""A request's body, read piece by piece and no further than it may be."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Final

from starlette.requests import Request

from serve.problems import Problem

_DISCARDED: Final = 4
"""How many times the limit is read of an image that is too large."""


async def read_body(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """All of it. Raises `Problem` for one that is too large, too slow or under a content encoding."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "an image is sent as it is, without a content encoding")
    return await read_encoded_body(request, max_bytes=max_bytes, seconds=seconds, read_bytes=_DISCARDED * max_bytes)


async def read_encoded_body(request: Request, *, max_bytes: int, seconds: float, read_bytes: int) -> bytes:
    """All of it, as it came, and in memory no more than ``max_bytes``. Raises `Problem` for one that is larger or slow.

    ``read_bytes``: how far one that is too large is read, so that its sender reads the answer.
    """
    found = bytearray()
    too_large = _announced(request) > max_bytes
    read = 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                read += len(chunk)
                if not too_large and read <= max_bytes:
                    found += chunk
                    continue
                too_large = True
                found.clear()
                if read > read_bytes:
                    break
    except TimeoutError:
        raise Problem(HTTPStatus.REQUEST_TIMEOUT, "the body was too slow") from None
    if too_large:
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {max_bytes:,} bytes")
    return bytes(found)


def _announced(request: Request) -> int:
    length = request.headers.get("content-length", "0")
    return int(length) if length.isdecimal() and len(length) < 20 else 0
