"""Features of a frozen encoder on disk, so that E(x) is computed once and read by whoever needs it.

Axes: N images, S their side, C channels, H height, W width of the feature.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.errors import ConfigError
from tasks.datasets.table import ImageArray, Normalisation
from tasks.transforms import mirror, to_tensor

logger = logging.getLogger(__name__)

FLOAT16_MAX = float(np.finfo(np.float16).max)
"""65504: what is larger becomes infinite in float16."""
_PATIENCE_S = 10.0
"""How long to wait for another process before saying that we wait."""


class FeatureCache:
    """Frozen-encoder features, computed once per encoder version and shared by every task, session and process.

    entry:  missing -> computing -> ready -> evicted (least recently used, when over max_bytes)

    missing     there is no file, or one that is truncated or foreign, which counts as none
    computing   one process holds the entry's lock and writes a temporary file; others wait for the lock. If it dies,
                the lock falls free, and the next one starts over
    ready       the file has its name, and never changes again; every reader maps the same pages of memory
    evicted     the file is gone; who has mapped it keeps it until the mapping ends. An entry is evicted only when
                another one is written, and never for one's own sake: the newest stays, whatever its size

    Stored as float16: a value is off by at most 2^-11 of itself (below 2^-14, where float16 is denormal, by 2^-25).
    """

    def __init__(self, root: Path, *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise ConfigError(f"max_bytes of the feature cache must be >= 0, got {max_bytes}; None is no limit")
        self.root, self.max_bytes = Path(root), max_bytes
        self.hits = 0
        """How often features were found, here or by another process while we waited."""
        self.misses = 0
        """How often this object computed them."""

    def encoder_features(
        self,
        encoder: nn.Module,
        images_u8: ImageArray,
        *,
        key: str,
        normalisation: Normalisation,
        mirrored: bool,
        batch_size: int = 256,
    ) -> NDArray[np.float16]:
        """E(x) of every image, as a read-only memory map of shape (N, C, H, W).

        ``images_u8`` is (N, S, S, 3). ``key`` must stand for the encoder's weights and the images: entries are found by
        it, normalisation and mirroring, not by content. The encoder runs where its parameters are, in evaluation mode.
        Raises `ConfigError` if a feature does not fit into float16, and `OSError` if the disk is full.
        """
        path = self._path(key, normalisation, mirrored=mirrored)
        found = self._open(path, len(images_u8))
        if found is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                found = self._open(path, len(images_u8))
                if found is None:
                    batches = _features(encoder, images_u8, normalisation, mirrored=mirrored, batch_size=batch_size)
                    with closing(batches):
                        computed = _write(path, batches, len(images_u8))
                    self.misses += 1
                    self._evict(keep=path)
                    return computed
        self.hits += 1
        with suppress(OSError):  # a cache that may only be read has no least recently used entry
            os.utime(path)
        return found

    def _path(self, key: str, normalisation: Normalisation, *, mirrored: bool) -> Path:
        identity = json.dumps([key, asdict(normalisation), mirrored], sort_keys=True)
        return self.root / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npy"

    def _open(self, path: Path, n: int) -> NDArray[np.float16] | None:
        """The entry, or None if it is missing or unusable."""
        try:
            features = _map(path)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError, OSError) as error:
            logger.warning("feature cache: %s is damaged (%s) and is computed again", path, error)
            return None
        if features.dtype != np.float16 or features.ndim < 2 or len(features) != n:
            logger.warning("feature cache: %s holds %s %s and is computed again", path, features.shape, features.dtype)
            return None
        return features

    def _evict(self, *, keep: Path) -> None:
        if self.max_bytes is None:
            return
        entries = []
        for path in self.root.glob("*.npy"):
            with suppress(FileNotFoundError):  # another process evicts too
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The entry's lock, held by one process at a time and let go by the operating system if it dies."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=_PATIENCE_S)
    except Timeout:
        logger.info("another process computes the encoder's features (%s); waiting for it", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _map(path: Path) -> NDArray[np.float16]:
    mapped: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _features(
    encoder: nn.Module, images_u8: ImageArray, normalisation: Normalisation, *, mirrored: bool, batch_size: int
) -> Generator[NDArray[np.float16], None, None]:
    """E(x) batch by batch; one empty batch if there are no images. The encoder's mode is put back."""
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    was_training = encoder.training
    encoder.eval()
    try:
        for start in range(0, max(1, len(images_u8)), batch_size):
            x = to_tensor(images_u8[start : start + batch_size], normalisation).to(device)
            with torch.no_grad():
                u = encoder(mirror(x) if mirrored else x)
            yield _to_float16(u)
    finally:
        encoder.train(was_training)


def _to_float16(u: Tensor) -> NDArray[np.float16]:
    largest = float(u.abs().max()) if u.numel() else 0.0
    if not largest <= FLOAT16_MAX:  # NaN is not smaller than anything
        what = f"reach {largest:.6g}, float16 ends at {FLOAT16_MAX:.0f}" if np.isfinite(largest) else f"hold {largest}"
        raise ConfigError(
            f"the encoder's features {what}: they cannot be cached. Check its weights and the images, "
            "or train without the cache (use_cache=False)"
        )
    return u.to(torch.float16).cpu().numpy()


def _write(path: Path, batches: Iterator[NDArray[np.float16]], n: int) -> NDArray[np.float16]:
    """Write an .npy file under a temporary name, rename it, and map it. Only the holder of the entry's lock comes here.

    Written through a file and not through a memory map: on a full disk the one raises an error, the other kills the
    process. Mapped before it has its name: from then on another process may evict it.
    """
    temporary = path.with_suffix(".tmp")
    first = next(batches)
    header = {"descr": "<f2", "fortran_order": False, "shape": (n, *first.shape[1:])}
    try:
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(first.tobytes())
            for batch in batches:
                file.write(batch.tobytes())
            file.flush()
            os.fsync(file.fileno())
        mapped = _map(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return mapped
