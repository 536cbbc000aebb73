"""Sealed labels, and the public key that they are sealed to, as a tenant is handed them: a file and a line of text."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import safetensors
import safetensors.numpy
from safetensors import SafetensorError

from orchestrator.errors import ConfigError, DataError
from orchestrator.wire import SealedLabels
from serve.tenant_key import KEY_BYTES

_FORMAT: Final = "metamorphosis sealed labels v1"
_PARTS: Final = ("nonce", "ciphertext", "wrapped_key")
_MOST_BYTES: Final = 1 << 30


def to_bytes(sealed: SealedLabels) -> bytes:
    """safetensors: the parts as uint8, task and subset as metadata."""
    parts = {part: np.frombuffer(getattr(sealed, part), np.uint8) for part in _PARTS}
    return safetensors.numpy.save(parts, {"format": _FORMAT, "task": sealed.task, "subset": sealed.subset})


def read_sealed(path: Path) -> SealedLabels:
    """What `to_bytes` gave, in a file. Raises `DataError`. Whether it is genuine shows when it is opened."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path} is too large for sealed labels")
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT or set(file.keys()) != set(_PARTS):
                raise DataError(f"{path} holds no sealed labels")
            parts = {part: file.get_tensor(part) for part in _PARTS}
    except OSError as error:
        raise DataError(f"cannot read the sealed labels in {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, TypeError) as error:
        raise DataError(f"{path} holds no sealed labels, or is damaged") from error
    if any(part.dtype != np.uint8 or part.ndim != 1 for part in parts.values()):
        raise DataError(f"{path} holds no sealed labels, or is damaged")
    return SealedLabels(
        task=metadata.get("task", ""),
        subset=metadata.get("subset", ""),
        nonce=parts["nonce"].tobytes(),
        ciphertext=parts["ciphertext"].tobytes(),
        wrapped_key=parts["wrapped_key"].tobytes(),
    )


def parse_public_key(text: str) -> bytes:
    """The 32 bytes of a public key as `labels.py key` prints it. Raises `ConfigError`."""
    try:
        raw = bytes.fromhex(text.strip())
    except ValueError:
        raw = b""
    if len(raw) != KEY_BYTES:
        raise ConfigError(
            f"{text!r} is no public key, which is {2 * KEY_BYTES} hexadecimal digits: see `labels.py key`"
        )
    return raw
