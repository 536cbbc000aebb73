"""Noise by key: the same again for the same image, and for anything else as good as independent."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
import stat

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from orchestrator.errors import CheckpointError, ConfigError, DataError
from orchestrator.privacy.bounded.channel import ChannelConfig, power_normalise, transmit
from orchestrator.privacy.bounded.keyed_noise import (
    ImageDigests,
    NoiseKey,
    fresh_normal,
    keyed_normal,
    release_digests,
)

KEY = NoiseKey(bytes(range(32)))
OTHER_KEY = NoiseKey(bytes(range(1, 33)))
CHANNEL = ChannelConfig(dimensions=8, noise=0.5)


def images(n: int, *, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def draw(x: np.ndarray, key: NoiseKey = KEY, task: str = "smile", version: str = "1", channel=CHANNEL) -> np.ndarray:
    return keyed_normal(key, task=task, version=version, channel=channel, images=x)


def test_asking_twice_gives_the_same_bytes_whatever_the_batch():
    x = images(20)
    assert draw(x).tobytes() == draw(x.copy()).tobytes()
    assert draw(x)[7:9].tobytes() == draw(x[7:9]).tobytes()
    assert draw(x[::-1])[::-1].tobytes() == draw(x).tobytes()
    assert draw(ImageDigests.of(x)).tobytes() == draw(x).tobytes()


def test_the_construction_is_the_one_that_was_published():
    """If these numbers change, every image that was released before would be released again with other noise."""
    expected = [1.7624755598031525, -1.157401907138616, -0.4306532486806727]
    x = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    got = draw(x, channel=ChannelConfig(dimensions=3, noise=0.5))[0]
    assert got == pytest.approx(expected, abs=1e-12)


OTHERS = {
    "another task": {"task": "age"},
    "another version": {"version": "2"},
    "another key": {"key": OTHER_KEY},
    "another tau": {"channel": ChannelConfig(dimensions=8, noise=0.25)},
    "names that run together": {"task": "smile1", "version": ""},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_anything_else_gives_independent_noise(other):
    x = images(2500)
    a, b = draw(x).ravel(), draw(x, **other).ravel()
    assert len(np.intersect1d(a, b)) == 0
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(a.size)
    assert abs(np.corrcoef(np.abs(a), np.abs(b))[0, 1]) < 5 / math.sqrt(a.size)


def test_another_number_of_dimensions_is_not_the_same_noise_cut_short():
    x = images(5)
    assert not np.isin(draw(x, channel=ChannelConfig(dimensions=4, noise=0.5)), draw(x)).any()


def test_one_pixel_by_one_makes_another_image():
    x = images(2500)
    changed = x.copy()
    changed[:, 3, 4, 1] ^= 1
    a, b = draw(x).ravel(), draw(changed).ravel()
    assert len(np.intersect1d(a, b)) == 0
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(a.size)


def test_the_same_bytes_in_another_shape_are_another_image():
    x = images(1, side=8)
    assert not np.isin(draw(x.reshape(1, 4, 16, 3)), draw(x)).any()


def test_all_draws_are_independent_of_each_other():
    """Coordinates and images: all correlations of a 1000 x 8 table are noise."""
    table = draw(images(20_000))
    correlations = np.corrcoef(table.T) - np.eye(8)
    assert np.abs(correlations).max() < 5 / math.sqrt(len(table))
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 5 / math.sqrt(table.size)


def test_the_noise_is_normal():
    channel = ChannelConfig(dimensions=100, noise=1.0)
    for noise in (draw(images(1000), channel=channel), fresh_normal(1000, channel)):
        assert noise.shape == (1000, 100)
        assert noise.dtype == np.float64
        assert np.isfinite(noise).all()
    keyed = draw(images(1000), channel=channel).ravel()
    assert kstest(keyed, "norm").pvalue > 1e-3
    assert kstest(keyed**2, "chi2", args=(1,)).pvalue > 1e-3
    assert np.abs(keyed).max() > 3.9, "the tails are there: 1e5 draws pass 3.9 with a probability of .9999"


def test_the_ends_of_the_keystream_are_finite(monkeypatch):
    from orchestrator.privacy.bounded import keyed_noise

    class Stream:
        def __init__(self, word: bytes) -> None:
            self.word = word

        def encryptor(self):
            return self

        def update(self, zeros: bytes) -> bytes:
            return self.word * len(zeros)

    for word, expected in ((b"\x00", -8.29), (b"\xff", 0.0)):
        monkeypatch.setattr(keyed_noise, "Cipher", lambda *_, word=word, **__: Stream(word))
        assert np.abs(fresh_normal(1, CHANNEL)) == pytest.approx(np.full((1, 8), abs(expected)), abs=0.01)


def test_a_map_has_noise_for_every_cell():
    channel = ChannelConfig(dimensions=4, noise=0.5, cells=6)
    noise = draw(images(3), channel=channel)
    assert noise.shape == (3, 4, 6)
    assert len(np.unique(noise)) == noise.size


def test_averaging_repeated_queries_gives_one_query_and_averaging_fresh_ones_gives_the_vector():
    """The reason for the key: 10,000 answers for one image, averaged by a tenant that wants its vector."""
    s = power_normalise(torch.linspace(-1, 2, 8, dtype=torch.float64)[None])
    x = np.repeat(images(1), 10_000, axis=0)
    answers = {
        "keyed": transmit(s.expand(10_000, 8), torch.from_numpy(draw(x)), 0.5),
        "fresh": transmit(s.expand(10_000, 8), torch.from_numpy(fresh_normal(10_000, CHANNEL)), 0.5),
    }
    once = transmit(s, torch.from_numpy(draw(x[:1])), 0.5)
    assert torch.equal(answers["keyed"], once.expand(10_000, 8)), "each repetition is the first answer, bit by bit"
    error = {name: (z.mean(0) - s[0]).square().mean().sqrt().item() for name, z in answers.items()}
    assert error["fresh"] < 0.02, "expected .5 / 100"
    assert error["keyed"] == pytest.approx((once - s).square().mean().sqrt().item(), abs=1e-9)
    assert error["keyed"] > 0.2


def test_fresh_noise_is_never_the_same():
    assert not np.isin(fresh_normal(100, CHANNEL), fresh_normal(100, CHANNEL)).any()
    assert fresh_normal(0, CHANNEL).shape == (0, 8)


def test_no_images_have_no_noise():
    assert draw(images(0)).shape == (0, 8)


@pytest.mark.parametrize("x", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), dtype=np.uint8)])
def test_only_images_have_noise(x):
    with pytest.raises(DataError, match="uint8"):
        draw(x)


# -- what the ledger sees ----------------------------------------------------------------------------------------------


def test_the_digest_of_a_release_tells_releases_apart_and_not_images():
    x = images(50)

    def of(x=x, key=KEY, tenant="t", task="smile", version="1"):
        return release_digests(key, tenant=tenant, task=task, version=version, images=x)

    assert of() == of()
    assert {len(digest) for digest in of()} == {16}
    every = [
        *of(),
        *of(tenant="u"),
        *of(task="age"),
        *of(version="2"),
        *of(key=OTHER_KEY),
        *of(tenant="ts", task="mile"),
    ]
    assert len(set(every)) == 300
    for digest, plain in zip(of(), ImageDigests.of(x).sha256, strict=True):
        assert digest not in plain


# -- the key -----------------------------------------------------------------------------------------------------------


def test_a_version_has_a_key_of_its_own_that_does_not_lead_back():
    assert KEY.derive("1").subkey(b"p") == KEY.derive("1").subkey(b"p")
    assert len({k.subkey(b"p") for k in (KEY, KEY.derive("1"), KEY.derive("2"), KEY.derive("1").derive("2"))}) == 4


def test_generated_keys_differ():
    assert NoiseKey.generate().subkey(b"p") != NoiseKey.generate().subkey(b"p")


def test_the_key_is_not_shown():
    secret = bytes(range(32))
    for text in (repr(KEY), str(KEY), f"{[KEY]}", repr(KEY.derive("1"))):
        assert text.strip("[]") == "NoiseKey(<hidden>)"
    assert not hasattr(KEY, "__dict__")
    x = images(3)
    assert ImageDigests.of(x).sha256[0].hex() not in repr(ImageDigests.of(x))
    assert secret.hex() not in repr(KEY)


@dataclasses.dataclass
class Holder:
    key: NoiseKey


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_key_cannot_be_pickled(protocol):
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(KEY, protocol=protocol)


def test_a_key_is_not_copied_by_what_holds_it():
    for work in (copy.copy, copy.deepcopy, lambda key: dataclasses.asdict(Holder(key))):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            work(KEY)


def test_a_key_is_saved_for_its_owner_alone_and_read_back(tmp_path):
    path = tmp_path / "keys" / "noise.key"
    before = os.umask(0)
    try:
        KEY.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert draw(images(1), key=NoiseKey.load(path)).tobytes() == draw(images(1)).tobytes()
    assert [file.name for file in path.parent.iterdir()] == ["noise.key"], "no temporary file is left"


def test_a_key_is_never_replaced(tmp_path):
    path = tmp_path / "noise.key"
    KEY.save(path)
    with pytest.raises(ConfigError, match="never replaced"):
        OTHER_KEY.save(path)
    assert NoiseKey.load(path).subkey(b"p") == KEY.subkey(b"p")
    assert [file.name for file in tmp_path.iterdir()] == ["noise.key"]


def test_a_key_whose_writing_was_interrupted_is_not_there(tmp_path, monkeypatch):
    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        KEY.save(tmp_path / "noise.key")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_may_read_is_refused(tmp_path, mode):
    path = tmp_path / "noise.key"
    KEY.save(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        NoiseKey.load(path)


def test_a_damaged_or_missing_key_is_refused(tmp_path):
    path = tmp_path / "noise.key"
    with pytest.raises(ConfigError, match="cannot read"):
        NoiseKey.load(path)
    KEY.save(path)
    whole = path.read_bytes()
    assert len(whole) == 67
    for damaged in (whole[:-1], whole[:30], b"", whole[:40] + b"x" + whole[41:], whole + b"\n", b"x" + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="no noise key"):
            NoiseKey.load(path)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_has_32_bytes(size):
    with pytest.raises(ConfigError, match="32 bytes"):
        NoiseKey(bytes(size))
