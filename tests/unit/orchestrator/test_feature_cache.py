import errno
import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from waiting import wait_for

from orchestrator import feature_cache
from orchestrator.errors import ConfigError
from orchestrator.feature_cache import FeatureCache
from tasks.datasets.table import IMAGENET, Normalisation
from tasks.transforms import mirror, to_tensor

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
ENTRY_BYTES = 10 * 4 * 3 * 3 * 2


class CountingEncoder(nn.Module):
    """A small convolution that knows how many images it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, stride=2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(self.layer.weight.shape, generator=torch.Generator().manual_seed(1)))
            self.layer.bias.zero_()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.seen += len(x)
        return self.layer(x)


def features(cache: FeatureCache, encoder: nn.Module, **options: object) -> np.ndarray:
    chosen = {"key": "encoder-data", "normalisation": IMAGENET, "mirrored": False} | options
    images = chosen.pop("images", IMAGES)
    return cache.encoder_features(encoder, images, **chosen)


def direct(encoder: nn.Module, *, mirrored: bool = False) -> np.ndarray:
    with torch.no_grad():
        x = to_tensor(IMAGES, IMAGENET)
        return encoder.eval()(mirror(x) if mirrored else x).numpy()


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("batch_size", [3, 5, 256])
def test_cached_features_are_the_encoders_own_up_to_half_precision(
    tmp_path: Path, batch_size: int, mirrored: bool
) -> None:
    encoder = CountingEncoder()
    cached = features(FeatureCache(tmp_path), encoder, mirrored=mirrored, batch_size=batch_size)
    exact = direct(encoder, mirrored=mirrored)
    assert cached.dtype == np.float16
    assert cached.shape == exact.shape == (10, 4, 3, 3)
    # 2^-11 of rounding, and what another batch size may change in float32.
    error = np.abs(cached.astype(np.float64) - exact)
    assert (error <= 2.0**-11 * np.abs(exact) + 2.0**-25 + 1e-6).all()
    assert error.max() > 0


def test_features_are_computed_once_and_then_read_by_any_cache_on_the_same_folder(tmp_path: Path) -> None:
    encoder, cache = CountingEncoder(), FeatureCache(tmp_path)
    first = features(cache, encoder)
    again = features(cache, encoder)
    other = FeatureCache(tmp_path)
    np.testing.assert_array_equal(features(other, encoder), first)
    np.testing.assert_array_equal(again, first)
    assert encoder.seen == 10
    assert (cache.hits, cache.misses, other.hits, other.misses) == (1, 1, 1, 0)


def test_features_are_a_read_only_map_of_the_file(tmp_path: Path) -> None:
    encoder, cache = CountingEncoder(), FeatureCache(tmp_path)
    for array in (features(cache, encoder), features(cache, encoder)):
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    "change",
    [{"key": "other"}, {"mirrored": True}, {"normalisation": Normalisation(mean=(0, 0, 0), std=(1, 1, 1))}],
)
def test_another_key_mirroring_or_normalisation_is_another_entry(tmp_path: Path, change: dict) -> None:
    encoder, cache = CountingEncoder(), FeatureCache(tmp_path)
    features(cache, encoder)
    features(cache, encoder, **change)
    assert (cache.misses, encoder.seen) == (2, 20)


def test_a_key_may_hold_anything_and_stays_in_the_folder(tmp_path: Path) -> None:
    features(FeatureCache(tmp_path / "cache"), CountingEncoder(), key="../../etc/x\0" + "y" * 500)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_the_encoders_mode_is_put_back(tmp_path: Path) -> None:
    encoder = CountingEncoder().train()
    features(FeatureCache(tmp_path), encoder)
    assert encoder.training
    encoder.eval()
    features(FeatureCache(tmp_path), encoder, key="b")
    assert not encoder.training


def test_no_images_give_no_features_of_the_right_shape(tmp_path: Path) -> None:
    encoder, cache = CountingEncoder(), FeatureCache(tmp_path)
    for _ in range(2):
        assert features(cache, encoder, images=IMAGES[:0]).shape == (0, 4, 3, 3)
    assert (cache.hits, cache.misses) == (1, 1)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "truncated":
            path.write_bytes(data[:-1])
        case "half":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "foreign":
            path.write_bytes(b"not an array" * 100)
        case "another number of images":
            np.save(path, np.zeros((9, 4, 3, 3), np.float16))
        case "another type":
            np.save(path, np.zeros((10, 4, 3, 3), np.float32))
        case "objects":
            np.save(path, np.array([{}] * 10), allow_pickle=True)


@pytest.mark.parametrize(
    "how", ["truncated", "half", "empty", "foreign", "another number of images", "another type", "objects"]
)
def test_a_damaged_entry_is_noticed_and_computed_again(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = CountingEncoder()
    expected = np.array(features(FeatureCache(tmp_path), encoder))
    (entry,) = tmp_path.glob("*.npy")
    damage(entry, how)
    cache = FeatureCache(tmp_path)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(features(cache, encoder), expected)
    assert "computed again" in caplog.text
    assert (cache.hits, cache.misses) == (0, 1)
    features(cache, encoder)
    assert cache.hits == 1


@pytest.mark.parametrize(
    ("bias", "message"), [(65536.0, "reach 655"), (-1e6, r"reach 1[.0-9]*e\+06"), (float("nan"), "hold nan")]
)
def test_features_that_half_precision_cannot_hold_are_refused_and_leave_nothing(
    tmp_path: Path, bias: float, message: str
) -> None:
    encoder = CountingEncoder()
    with torch.no_grad():
        encoder.layer.bias.fill_(bias)
    with pytest.raises(ConfigError, match=f"features {message}.*cannot be cached"):
        features(FeatureCache(tmp_path), encoder)
    assert not list(tmp_path.glob("*.npy"))
    assert not list(tmp_path.glob("*.tmp"))


def test_an_entry_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    class Watching(CountingEncoder):
        def forward(self, x: Tensor) -> Tensor:
            assert entry_files(tmp_path) == 0
            return super().forward(x)

    features(FeatureCache(tmp_path), Watching(), batch_size=2)
    assert entry_files(tmp_path) == 1


def test_the_largest_half_is_kept_as_it_is(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    with torch.no_grad():
        encoder.layer.weight.zero_()
        encoder.layer.bias.fill_(65504.0)
    assert (features(FeatureCache(tmp_path), encoder) == np.float16(65504)).all()


def test_a_full_disk_is_an_error_and_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    encoder = CountingEncoder().train()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            features(FeatureCache(tmp_path), encoder)
    assert encoder.training
    assert {p.suffix for p in tmp_path.iterdir()} <= {".lock"}
    assert features(FeatureCache(tmp_path), encoder).shape == (10, 4, 3, 3)


def entry_files(root: Path) -> int:
    return len(list(root.glob("*.npy")))


def test_the_least_recently_used_entry_goes_when_there_is_too_much(tmp_path: Path) -> None:
    encoder, cache = CountingEncoder(), FeatureCache(tmp_path, max_bytes=2 * (ENTRY_BYTES + 128))
    held = features(cache, encoder, key="a")
    before = np.array(held)
    features(cache, encoder, key="b")
    for age, key in enumerate(("b", "a"), start=1):
        old = time.time() - 1000 * age
        os.utime(cache._path(key, IMAGENET, mirrored=False), (old, old))
    features(cache, encoder, key="a")  # now b is the older one
    features(cache, encoder, key="c")
    assert entry_files(tmp_path) == 2
    hits = cache.hits
    features(cache, encoder, key="a")
    features(cache, encoder, key="c")
    assert cache.hits == hits + 2
    features(cache, encoder, key="b")
    assert (cache.hits, cache.misses) == (hits + 2, 4)
    np.testing.assert_array_equal(held, before)  # whoever maps an entry keeps it


def test_an_entry_larger_than_the_limit_is_served_all_the_same(tmp_path: Path) -> None:
    encoder, cache = CountingEncoder(), FeatureCache(tmp_path, max_bytes=0)
    features(cache, encoder, key="a")
    features(cache, encoder, key="b")
    assert entry_files(tmp_path) == 1
    features(cache, encoder, key="b")
    assert cache.hits == 1


def test_an_entry_that_is_evicted_the_moment_it_is_written_is_still_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, cache = CountingEncoder(), FeatureCache(tmp_path)
    monkeypatch.setattr(cache, "_evict", lambda keep: keep.unlink())
    np.testing.assert_allclose(features(cache, encoder), direct(encoder), rtol=2e-3, atol=1e-4)


@pytest.fixture
def context() -> multiprocessing.context.SpawnContext:
    return multiprocessing.get_context("spawn")


class SlowEncoder(CountingEncoder):
    """Takes its time, so that others come while it computes; says on disk that it was asked."""

    def __init__(self, log: Path, seconds: float) -> None:
        super().__init__()
        self.log, self.seconds = log, seconds

    def forward(self, x: Tensor) -> Tensor:
        (self.log / f"{os.getpid()}").touch()
        time.sleep(self.seconds)
        return super().forward(x)


def child(root: str, log: str, seconds: float, out: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    cache = FeatureCache(Path(root))
    array = features(cache, SlowEncoder(Path(log), seconds))
    out.put((cache.hits, cache.misses, float(np.asarray(array, np.float64).sum())))


def test_processes_that_start_together_compute_it_once_and_a_killed_one_holds_nobody_up(
    tmp_path: Path, context: multiprocessing.context.SpawnContext
) -> None:
    root, log, out = tmp_path / "cache", tmp_path / "log", context.Queue()
    log.mkdir()
    killed = context.Process(target=child, args=(str(root), str(log), 600.0, out))
    others = [context.Process(target=child, args=(str(root), str(log), 0.5, out)) for _ in range(2)]
    try:
        killed.start()
        wait_for(lambda: list(log.iterdir()), 120)
        for other in others:
            other.start()
        assert killed.pid is not None
        os.kill(killed.pid, signal.SIGKILL)
        results = sorted(out.get(timeout=240) for _ in others)
    finally:
        for process in (killed, *others):
            process.kill()
            process.join()
    assert [result[:2] for result in results] == [(0, 1), (1, 0)]
    assert results[0][2] == results[1][2]
    assert len(list(log.iterdir())) == 2  # the killed one, and one of the two others
    assert results[0][2] == pytest.approx(float(direct(CountingEncoder()).sum()), rel=1e-2, abs=0.5)


def test_whoever_waits_for_another_process_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feature_cache, "_PATIENCE_S", 0.05)
    encoder, cache, done = CountingEncoder(), FeatureCache(tmp_path), []
    entry = cache._path("encoder-data", IMAGENET, mirrored=False)
    with caplog.at_level(logging.INFO, logger="orchestrator.feature_cache"):
        with feature_cache._locked(entry):
            thread = threading.Thread(target=lambda: done.append(features(cache, encoder)))
            thread.start()
            wait_for(lambda: "waiting for it" in caplog.text, 120)
            assert not done
        thread.join(60)
    assert len(done) == 1
