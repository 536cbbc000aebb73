"""Labels on their way to a tenant: sealed by the producer, readable only by the one tenant that they are for.

One fresh AES-256-GCM key per sealing, wrapped with HPKE (RFC 9180; X25519, HKDF-SHA256, AES-256-GCM) to the tenant's
public key. Task and subset are authenticated in both layers, so a label can neither be read nor passed off elsewhere.
HPKE's base mode does not say who sealed: that the labels come from the producer is for the transport to guarantee.
Axes: N rows of a subset.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from numpy.typing import NDArray

from orchestrator.errors import DataError, ProtocolError
from orchestrator.wire import PublicKey, SealedLabels

_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_PURPOSE: Final = b"metamorphosis labels v1"
_HEADER: Final = struct.Struct("<IQ")
"""Number of classes, number of rows; then the labels as little-endian unsigned integers of the narrowest width."""


@dataclass(frozen=True, slots=True)
class TenantKey:
    """A tenant's X25519 key pair. The private half stays in the tenant's process: it cannot be pickled or printed."""

    _private: X25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls) -> TenantKey:
        """A fresh pair from the operating system's randomness."""
        return cls(X25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, raw: bytes) -> TenantKey:
        """The pair whose private half `to_bytes` gave."""
        try:
            return cls(X25519PrivateKey.from_private_bytes(raw))
        except ValueError as error:
            raise DataError(f"an X25519 private key is 32 bytes, got {len(raw)}") from error

    def to_bytes(self) -> bytes:
        """The private half, 32 bytes: a secret, for a file that only the tenant can read."""
        return self._private.private_bytes_raw()

    def public_key(self, task: str) -> PublicKey:
        """The public half, as the tenant of that task sends it."""
        return PublicKey(task=task, raw=self._private.public_key().public_bytes_raw())

    def unwrap(self, wrapped: bytes, *, info: bytes) -> bytes:
        """Decrypt what was encrypted to the public half. Raises ``InvalidTag``."""
        return _SUITE.decrypt(wrapped, self._private, info=info)


def seal_labels(
    labels: NDArray[np.int64],
    *,
    task: str,
    subset: str,
    key: PublicKey,
    n_classes: int,
    shape: tuple[int, ...] = (),
) -> SealedLabels:
    """The labels (N, *shape) of one task and subset, readable only with the private half of ``key``.

    ``shape`` is that of one label, () for a class, and ``n_classes`` counts the values that it may have. Raises
    `ProtocolError` for a key of another task or no X25519 point, `DataError` for labels of another shape or outside
    ``0..n_classes-1``.
    """
    if key.task != task:
        raise ProtocolError(f"labels of task {task!r} were to be sealed to the tenant of task {key.task!r}")
    body = _encode(labels, n_classes, shape)
    context = _context(task, subset)
    data_key, nonce = AESGCM.generate_key(256), os.urandom(12)
    try:
        wrapped = _SUITE.encrypt(data_key, X25519PublicKey.from_public_bytes(key.raw), info=context)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"the tenant of task {task!r} sent a public key that is no X25519 point") from error
    return SealedLabels(
        task=task,
        subset=subset,
        nonce=nonce,
        ciphertext=AESGCM(data_key).encrypt(nonce, body, context),
        wrapped_key=wrapped,
    )


def open_labels(
    sealed: SealedLabels, tenant_key: TenantKey, *, task: str, subset: str, shape: tuple[int, ...] = ()
) -> NDArray[np.int64]:
    """The labels (N, *shape), as the task's specification says.

    Raises `ProtocolError` if they are of another task or subset, for another tenant, or were changed on the way.
    """
    if (sealed.task, sealed.subset) != (task, subset):
        raise ProtocolError(
            f"expected the {subset!r} labels of task {task!r}, got the {sealed.subset!r} labels of {sealed.task!r}"
        )
    context = _context(task, subset)
    try:
        data_key = tenant_key.unwrap(sealed.wrapped_key, info=context)
        body = AESGCM(data_key).decrypt(sealed.nonce, sealed.ciphertext, context)
    except (InvalidTag, ValueError) as error:
        raise ProtocolError(
            f"the {subset!r} labels of task {task!r} cannot be opened: they were sealed to another key, "
            "for another task or subset, or were changed on the way"
        ) from error
    return _decode(body, shape)


def _context(task: str, subset: str) -> bytes:
    """What is authenticated. Each part with its length, so no two pairs of names run together."""
    parts = (_PURPOSE, task.encode(), subset.encode())
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def _encode(labels: NDArray[np.int64], n_classes: int, shape: tuple[int, ...]) -> bytes:
    if labels.ndim < 1 or labels.shape[1:] != shape or labels.dtype != np.int64:
        wanted = "a vector" if not shape else f"(N, {', '.join(map(str, shape))})"
        raise DataError(f"labels must be {wanted} of int64, got {labels.dtype} of shape {labels.shape}")
    if len(labels) and not (labels.min() >= 0 and labels.max() < n_classes):
        raise DataError(f"labels must be from 0 to {n_classes - 1}, got {labels.min()} to {labels.max()}")
    return _HEADER.pack(n_classes, len(labels)) + labels.astype(_width(n_classes)).tobytes()


def _decode(body: bytes, shape: tuple[int, ...]) -> NDArray[np.int64]:
    try:
        n_classes, n_rows = _HEADER.unpack_from(body)
        labels = np.frombuffer(body, dtype=_width(n_classes), offset=_HEADER.size).astype(np.int64)
    except (struct.error, ValueError) as error:
        raise ProtocolError("sealed labels are truncated") from error
    if len(labels) != n_rows * math.prod(shape) or (n_rows and labels.max() >= n_classes):
        raise ProtocolError(f"sealed labels do not hold {n_rows} labels of {n_classes} classes")
    return labels.reshape(n_rows, *shape)


def _width(n_classes: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u1" if n_classes <= 1 << 8 else "<u2" if n_classes <= 1 << 16 else "<u4")
