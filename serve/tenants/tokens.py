"""Bearer tokens: ``mm_<id>_<secret>``, the id to find it by, the secret of 256 random bits to prove it.

Only a digest of the secret is kept. A secret of full entropy needs no slow hash: guessing one takes 2^255 tries, with
the digest in hand or without.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

_SECRET_BYTES: Final = 32
_ID_BYTES: Final = 8
_PURPOSE: Final = b"metamorphosis token v1\0"
_LONGEST_HEADER: Final = 256
_HEADER: Final = re.compile(r"(?i:bearer) +mm_([0-9a-f]{16})_([A-Za-z0-9_-]{43})", re.ASCII)
_NOBODY: Final = hashlib.sha256(secrets.token_bytes(_SECRET_BYTES)).digest()
"""Of a secret that nobody has: what a secret is compared with where its id is unknown."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token in clear. It is shown once, to who asked for it, and never printed by accident."""

    id: str
    _secret: str = field(repr=False)

    @classmethod
    def generate(cls) -> Token:
        """A new one, from the operating system's randomness."""
        return cls(secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES))

    @classmethod
    def from_header(cls, authorization: str | None) -> Token | None:
        """What an ``Authorization: Bearer`` header carries; None if there is none, or it is malformed."""
        if authorization is None or len(authorization) > _LONGEST_HEADER:
            return None
        found = _HEADER.fullmatch(authorization)
        return None if found is None else cls(found[1], found[2])

    @property
    def text(self) -> str:
        """The token itself: a secret."""
        return f"mm_{self.id}_{self._secret}"

    @property
    def digest(self) -> bytes:
        """What is kept of it, 32 bytes."""
        return hashlib.sha256(_PURPOSE + self._secret.encode()).digest()

    def matches(self, digest: bytes | None) -> bool:
        """Whether it is the one with this digest, in a time that does not depend on either. None matches nothing."""
        same = hmac.compare_digest(self.digest, _NOBODY if digest is None else digest)
        return same and digest is not None
