from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from orchestrator.errors import DataError, ProtocolError
from orchestrator.privacy import escrow
from orchestrator.privacy.escrow import TenantKey, open_labels, seal_labels
from orchestrator.wire import PublicKey, SealedLabels

KEY = TenantKey.generate()
LABELS = np.random.default_rng(0).integers(0, 7, 200)


def sealed_labels(labels=LABELS, n_classes=7):
    return seal_labels(labels, task="smile", subset="train", key=KEY.public_key("smile"), n_classes=n_classes)


def opened(sealed, key=KEY, task="smile", subset="train", shape=()):
    return open_labels(sealed, key, task=task, subset=subset, shape=shape)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([2, 256, 257, 65536, 65537, 2**31]).flatmap(
        lambda k: st.tuples(st.just(k), hnp.arrays(np.int64, st.integers(0, 50), elements=st.integers(0, k - 1)))
    )
)
def test_what_was_sealed_is_what_is_opened(case):
    n_classes, labels = case
    again = opened(sealed_labels(labels, n_classes))
    assert again.dtype == np.int64
    np.testing.assert_array_equal(again, labels)


def test_another_tenants_key_opens_nothing():
    with pytest.raises(ProtocolError, match="cannot be opened"):
        opened(sealed_labels(), key=TenantKey.generate())


@pytest.mark.parametrize("part", ["nonce", "ciphertext", "wrapped_key"])
def test_any_changed_byte_is_noticed(part):
    sealed = sealed_labels()
    raw = getattr(sealed, part)
    for position in {0, 1, len(raw) // 2, len(raw) - 1}:
        changed = bytearray(raw)
        changed[position] ^= 1
        with pytest.raises(ProtocolError, match="cannot be opened"):
            opened(dataclasses.replace(sealed, **{part: bytes(changed)}))


@pytest.mark.parametrize("part", ["nonce", "ciphertext", "wrapped_key"])
@pytest.mark.parametrize("length", [0, 5, 31, 1000])
def test_parts_of_any_other_length_are_refused(part, length):
    with pytest.raises(ProtocolError, match="cannot be opened"):
        opened(dataclasses.replace(sealed_labels(), **{part: bytes(length)}))


@pytest.mark.parametrize(("task", "subset"), [("identity", "train"), ("smile", "test"), ("identity", "test")])
def test_labels_of_another_task_or_subset_are_refused_even_relabelled(task, subset):
    sealed = sealed_labels()
    with pytest.raises(ProtocolError, match="expected the"):
        opened(sealed, task=task, subset=subset)
    with pytest.raises(ProtocolError, match="cannot be opened"):
        opened(dataclasses.replace(sealed, task=task, subset=subset), task=task, subset=subset)


def test_names_that_run_together_are_not_confused():
    sealed = seal_labels(LABELS, task="ab", subset="c", key=KEY.public_key("ab"), n_classes=7)
    with pytest.raises(ProtocolError, match="cannot be opened"):
        opened(dataclasses.replace(sealed, task="a", subset="bc"), task="a", subset="bc")


def test_a_ciphertext_does_not_go_with_another_sealings_key():
    one, two = sealed_labels(), sealed_labels()
    with pytest.raises(ProtocolError, match="cannot be opened"):
        opened(dataclasses.replace(one, ciphertext=two.ciphertext, nonce=two.nonce))


def test_maps_are_sealed_as_they_are_and_opened_in_their_shape_alone():
    maps = np.random.default_rng(0).integers(0, 256, (5, 1, 3, 4))
    names = {"task": "smile", "subset": "train", "key": KEY.public_key("smile")}
    sealed = seal_labels(maps, **names, n_classes=256, shape=(1, 3, 4))
    assert len(sealed.ciphertext) == maps.size + 12 + 16, "a byte a place"
    np.testing.assert_array_equal(opened(sealed, shape=(1, 3, 4)), maps)
    with pytest.raises(ProtocolError, match="do not hold 5 labels"):
        opened(sealed)
    with pytest.raises(ProtocolError, match="do not hold 5 labels"):
        opened(sealed, shape=(1, 4, 4))
    with pytest.raises(DataError, match=r"labels must be \(N, 3, 4\) of int64"):
        seal_labels(maps, **names, n_classes=256, shape=(3, 4))


def test_the_ciphertext_shows_nothing_of_the_labels():
    constant = sealed_labels(np.full(4096, 3))
    everything = constant.nonce + constant.ciphertext + constant.wrapped_key
    for dtype in ("<u1", "<u2", "<u4", "<i8"):
        assert np.full(4, 3, dtype=dtype).tobytes() not in everything
    blocks = [constant.ciphertext[i : i + 16] for i in range(0, 4096, 16)]
    assert len(set(blocks)) == len(blocks)  # equal labels, no two equal blocks
    counts = np.bincount(np.frombuffer(constant.ciphertext, dtype=np.uint8), minlength=256)
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 255 + 6 * np.sqrt(2 * 255)


def test_sealing_twice_gives_different_bytes_of_the_same_length():
    one, two = sealed_labels(np.zeros(50, np.int64)), sealed_labels(np.full(50, 6))
    assert {len(one.ciphertext)} == {len(two.ciphertext)} == {50 + 12 + 16}  # labels, header, tag
    again = sealed_labels(np.zeros(50, np.int64))
    for part in ("nonce", "ciphertext", "wrapped_key"):
        assert getattr(one, part) != getattr(again, part)


def test_labels_are_not_sealed_to_the_tenant_of_another_task():
    with pytest.raises(ProtocolError, match="identity"):
        seal_labels(LABELS, task="smile", subset="train", key=KEY.public_key("identity"), n_classes=7)


@pytest.mark.parametrize("raw", [b"", bytes(31), bytes(33), bytes(32), "text"])
def test_a_public_key_that_is_no_point_is_refused(raw):
    with pytest.raises(ProtocolError, match="no X25519 point"):
        seal_labels(LABELS, task="smile", subset="train", key=PublicKey(task="smile", raw=raw), n_classes=7)


@pytest.mark.parametrize(
    "labels", [np.array([0, 7]), np.array([-1, 0]), np.array([[0, 1]]), np.array([0.0, 1.0]), np.array([0], np.int32)]
)
def test_labels_that_are_no_class_indices_are_refused(labels):
    with pytest.raises(DataError, match="labels must be"):
        sealed_labels(labels)


def sealed_body(body):
    """What a sender with the right key, and with its own idea of the format, can make a tenant open."""
    context, data_key, nonce = escrow._context("smile", "train"), AESGCM.generate_key(256), bytes(12)
    public = X25519PublicKey.from_public_bytes(KEY.public_key("smile").raw)
    return SealedLabels(
        task="smile",
        subset="train",
        nonce=nonce,
        ciphertext=AESGCM(data_key).encrypt(nonce, body, context),
        wrapped_key=escrow._SUITE.encrypt(data_key, public, info=context),
    )


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=40))
def test_whatever_bytes_were_sealed_are_parsed_or_refused(body):
    try:
        labels = opened(sealed_body(body))
    except ProtocolError:
        return
    assert labels.dtype == np.int64
    assert labels.ndim == 1
    assert (labels >= 0).all()


@pytest.mark.parametrize(("n_classes", "n_rows", "labels"), [(3, 2, b"\x00"), (3, 1, b"\x00\x01"), (3, 1, b"\x03")])
def test_sealed_labels_that_contradict_their_header_are_refused(n_classes, n_rows, labels):
    header = n_classes.to_bytes(4, "little") + n_rows.to_bytes(8, "little")
    with pytest.raises(ProtocolError, match=f"do not hold {n_rows} labels of 3 classes"):
        opened(sealed_body(header + labels))


def test_the_private_key_is_neither_printed_nor_pickled_nor_hidden_in_the_public_one():
    secret = KEY.to_bytes()
    assert secret.hex() not in f"{KEY!r} {KEY} {KEY.public_key('smile')!r}"
    assert str(secret) not in f"{KEY!r} {KEY}"
    assert KEY.public_key("smile").raw != secret
    with pytest.raises(TypeError):
        pickle.dumps(KEY)


def test_a_kept_private_key_opens_what_was_sealed_before():
    np.testing.assert_array_equal(opened(sealed_labels(), key=TenantKey.from_bytes(KEY.to_bytes())), LABELS)
    with pytest.raises(DataError, match="32 bytes, got 3"):
        TenantKey.from_bytes(b"abc")


def test_two_tenants_have_different_keys():
    assert TenantKey.generate().to_bytes() != TenantKey.generate().to_bytes()
    assert copy.copy(KEY).to_bytes() == KEY.to_bytes()
