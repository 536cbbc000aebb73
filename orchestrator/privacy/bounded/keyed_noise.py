"""The noise on a bounded feature, as a function of the key, the task, its version, the channel and the image's content.

A feature that is asked for again comes with the same noise, so repeating or averaging teaches nothing new. With fresh
noise R releases of one image carry up to R times the bits, and their mean is the vector itself.

    stream key  = HKDF-SHA256(HKDF-SHA256(key, version), task, channel)
    seed        = HMAC-SHA256(stream key, SHA-256(shape, type, pixels))
    noise       = inverse normal CDF of the ChaCha20 keystream of that seed, coordinate by coordinate

A version names the weights: with other weights under the same version, the difference of two features would hold no
noise. The channel is bound in for the same reason. One pixel makes another image: near-duplicates, such as neighbouring
frames of a video, have noise of their own, and the ledger counts each (`orchestrator.privacy.bounded.bit_ledger`). The
same bytes come out on one platform and version of SciPy; elsewhere the last digit may differ, which `channel.quantised`
hides.

Axes: N images, S pixels a side, D dimensions, L cells.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from orchestrator.errors import CheckpointError, ConfigError, DataError
from orchestrator.privacy.bounded.bit_ledger import RELEASE_DIGEST_BYTES
from orchestrator.privacy.bounded.channel import ChannelConfig

Noise: TypeAlias = NDArray[np.float64]

KEY_BYTES: Final = 32
_PURPOSE: Final = b"metamorphosis bounded feature v1"
_FILE_HEADER: Final = b"metamorphosis noise key v1\n"
_CHECKSUM_BYTES: Final = 8


class NoiseKey:
    """The producer's secret, 256 bits. It cannot be printed, pickled or copied, and leaves the process by `save` alone.

    Whoever has it can take the noise off every feature that was released under it. Whoever loses it must not go on
    with another key under the same versions: two draws of noise are two releases.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ConfigError(f"a noise key is {KEY_BYTES} bytes, got {len(secret)}")
        self._secret = bytes(secret)

    @classmethod
    def generate(cls) -> NoiseKey:
        """A new key from the operating system."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> NoiseKey:
        """Read what `save` wrote.

        Raises `ConfigError` if it is missing or others may read it, and `CheckpointError` if it is damaged.
        """
        try:
            with path.open("rb") as file:
                mode, data = os.fstat(file.fileno()).st_mode, file.read()
        except OSError as error:
            raise ConfigError(f"cannot read the noise key {path}: {error.strerror}") from error
        if mode & 0o077:
            raise ConfigError(
                f"the noise key {path} may be read by others than its owner (mode {mode & 0o777:o}): chmod 600 it, "
                "and take it for known if others use this machine"
            )
        secret = data[len(_FILE_HEADER) : -_CHECKSUM_BYTES]
        if data != _file_content(secret) or len(secret) != KEY_BYTES:
            raise CheckpointError(f"{path} is no noise key, or damaged")
        return cls(secret)

    def save(self, path: Path) -> None:
        """Write a new file that only its owner can read: all of it, or none.

        Raises `ConfigError` if there is a file: a key that is replaced is lost, and its versions with it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_file_content(self._secret))
                file.flush()
                os.fsync(file.fileno())
            path.hardlink_to(temporary)  # unlike a rename it does not replace
        except FileExistsError as error:
            raise ConfigError(f"{path} exists already; a noise key is never replaced") from error
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def derive(self, version: str) -> NoiseKey:
        """The key of one version, which tells nothing of the others or of this one."""
        return NoiseKey(self.subkey(b"version", version.encode()))

    def subkey(self, *purpose: bytes) -> bytes:
        """32 bytes for one purpose, by HKDF-SHA256."""
        return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=_joined(_PURPOSE, *purpose)).derive(
            self._secret
        )

    def __repr__(self) -> str:
        return "NoiseKey(<hidden>)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a noise key cannot be pickled or copied: it does not leave the producer")


@dataclass(frozen=True, slots=True)
class ImageDigests:
    """What identifies N images by content, computed once for all tasks and the ledger. A secret of the producer."""

    sha256: tuple[bytes, ...]

    @classmethod
    def of(cls, images_u8: NDArray[np.uint8]) -> ImageDigests:
        """Of (N, S, S, 3) images of uint8: of shape, type and pixels. Raises `DataError` for others."""
        if images_u8.ndim != 4 or images_u8.dtype != np.uint8:
            raise DataError(
                f"noise is a function of images (N, S, S, 3) of uint8, got {images_u8.dtype} of shape {images_u8.shape}"
            )
        header = _joined(b"uint8", *(str(size).encode() for size in images_u8.shape[1:]))
        start = hashlib.sha256(header)
        digests = []
        for image in np.ascontiguousarray(images_u8):
            digest = start.copy()
            digest.update(image.data)
            digests.append(digest.digest())
        return cls(tuple(digests))

    def __len__(self) -> int:
        return len(self.sha256)

    def __repr__(self) -> str:
        return f"ImageDigests(<{len(self)} hidden>)"


def keyed_normal(
    key: NoiseKey, *, task: str, version: str, channel: ChannelConfig, images: NDArray[np.uint8] | ImageDigests
) -> Noise:
    """Standard normal noise for N images: (N, D), or (N, D, L) where the channel has L > 1 cells.

    Equal arguments give equal bytes, whatever other images are in the batch. Anything else, if only a pixel, another
    task, version, key or channel, gives noise that no one without the key can tell from independent.
    """
    stream = key.derive(version).subkey(b"noise", task.encode(), _channel_bytes(channel))
    seeds = [hmac.digest(stream, digest, "sha256") for digest in _digests(images).sha256]
    return _normal(seeds, channel)


def step_normal(key: NoiseKey, *, run: str, task: str, step: int, n: int, channel: ChannelConfig) -> Noise:
    """As `keyed_normal`, for the n examples of one step of a training, by their place in the batch.

    A step that is done again, after a crash or in another process, gives the same noise, as batches and mirroring are
    functions of the step. Other weights see an image in every step, so every step is another draw, and a release that
    counts. ``run`` must be of one training alone: two that shared it would share their noise.
    """
    names = (run.encode(), task.encode(), str(step).encode())
    stream = key.subkey(b"training", *names, _channel_bytes(channel))
    return _normal([hmac.digest(stream, struct.pack("<Q", place), "sha256") for place in range(n)], channel)


def fresh_normal(n: int, channel: ChannelConfig) -> Noise:
    """As `keyed_normal`, from the operating system's randomness: every release is another draw, and must be charged."""
    return _normal([secrets.token_bytes(KEY_BYTES) for _ in range(n)], channel)


def release_digests(
    key: NoiseKey, *, tenant: str, task: str, version: str, images: NDArray[np.uint8] | ImageDigests
) -> list[bytes]:
    """By which the ledger recognises a release: 16 bytes an image, which say nothing of the image without the key."""
    own = key.subkey(b"ledger", tenant.encode(), task.encode(), version.encode())
    return [hmac.digest(own, digest, "sha256")[:RELEASE_DIGEST_BYTES] for digest in _digests(images).sha256]


def _normal(seeds: Sequence[bytes], channel: ChannelConfig) -> Noise:
    """One 64-bit word of keystream a coordinate: a sign, and 52 bits of a uniform in (0, 1/2).

    The lower tail alone is inverted, where a float resolves it: u = (k + 1/2) / 2^53 is exact, never 0, and noise goes
    to +-8.29. The exact normal distribution is met up to a total variation of about 2^-52 a coordinate.
    """
    from scipy.special import ndtri

    zeros, nonce = bytes(8 * channel.dimensions * channel.cells), bytes(16)
    # A seed keys one stream only, so the nonce may be the same.
    stream = b"".join(Cipher(ChaCha20(seed, nonce), mode=None).encryptor().update(zeros) for seed in seeds)
    words = np.frombuffer(stream, dtype="<u8")
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-53
    sign = 1.0 - 2.0 * (words & np.uint64(1)).astype(np.float64)
    shape = (channel.dimensions,) if channel.cells == 1 else (channel.dimensions, channel.cells)
    noise: Noise = (sign * ndtri(uniform)).reshape(len(seeds), *shape)
    return noise


def _digests(images: NDArray[np.uint8] | ImageDigests) -> ImageDigests:
    return images if isinstance(images, ImageDigests) else ImageDigests.of(images)


def _channel_bytes(channel: ChannelConfig) -> bytes:
    return struct.pack("<QdQ", channel.dimensions, channel.noise, channel.cells)


def _joined(*parts: bytes) -> bytes:
    """Each part with its length, so no two lists of names run together."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def _file_content(secret: bytes) -> bytes:
    return _FILE_HEADER + secret + hashlib.sha256(_FILE_HEADER + secret).digest()[:_CHECKSUM_BYTES]
