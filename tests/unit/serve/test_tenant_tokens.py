"""Tokens: found by their id, proved by their secret, and kept as a digest."""

from __future__ import annotations

import hmac
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.tenants import tokens
from serve.tenants.gate import Gate, Refused
from serve.tenants.registry import Registry
from serve.tenants.tokens import Token

TOKEN = Token.generate()
SECRET = TOKEN.text[20:]


def test_a_secret_has_256_random_bits_and_no_two_tokens_share_anything():
    made = [Token.generate() for _ in range(2000)]  # one of 64 characters is missed somewhere once in 10^10 runs
    assert len({token.id for token in made}) == len({token.digest for token in made}) == 2000
    assert all(len(token.text) == 3 + 16 + 1 + 43 for token in made)
    for position in range(20, 62):  # 43 characters of 6 bits; the last one has 4
        assert len({token.text[position] for token in made}) == 64, position


@given(scheme=st.sampled_from(["Bearer", "bearer", "BEARER", "bEaReR"]), spaces=st.integers(1, 3))
def test_a_token_comes_back_out_of_its_header(scheme, spaces):
    found = Token.from_header(f"{scheme}{' ' * spaces}{TOKEN.text}")
    assert found == TOKEN
    assert found.matches(TOKEN.digest)


@settings(max_examples=300)
@given(position=st.integers(0, 62), character=st.characters(codec="utf-8") | st.sampled_from(string.printable))
def test_a_token_with_any_character_changed_is_nobodys(position, character):
    changed = TOKEN.text[:position] + character + TOKEN.text[position + 1 :]
    found = Token.from_header(f"Bearer {changed}")
    assert (found is not None and found.id == TOKEN.id and found.matches(TOKEN.digest)) == (changed == TOKEN.text)


@settings(max_examples=300)
@given(
    st.none()
    | st.text(max_size=300)
    | st.text(alphabet="Bbearmm_0123456789 -\n\0\udc80", max_size=100)
    | st.builds("Bearer mm_{}_{}".format, st.text(max_size=20), st.text(max_size=50))
)
def test_whatever_a_header_says_it_is_read_or_refused_and_nothing_else_happens(header):
    found = Token.from_header(header)
    if found is not None:
        assert header.split(" ", 1)[1].strip(" ") == found.text
        assert not found.matches(TOKEN.digest)


def test_a_secret_is_compared_whole_whether_its_id_is_known_or_not(monkeypatch):
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    class Counting:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(tokens, "hmac", Counting)
    assert TOKEN.matches(TOKEN.digest)
    assert not TOKEN.matches(bytes(32))
    assert not TOKEN.matches(None)
    assert [(a, len(b)) for a, b in compared] == [(TOKEN.digest, 32)] * 3


def test_an_unknown_id_is_refused_even_by_the_digest_of_nobody(monkeypatch):
    monkeypatch.setattr(tokens, "_NOBODY", TOKEN.digest)
    assert not TOKEN.matches(None)


def test_neither_a_repr_nor_the_digest_shows_the_secret():
    assert SECRET not in f"{TOKEN!r} {TOKEN}"
    assert SECRET.encode() not in TOKEN.digest
    assert TOKEN.digest != Token.generate().digest


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """A gate, and the header of a tenant that may read one task."""
    path = tmp_path_factory.mktemp("door") / "registry.db"
    with Registry(path) as registry:
        issued = registry.add("alice", "tenant")
        registry.grant("alice", "smile")
    gate = Gate(path)
    yield gate, f"Bearer {issued.token.text}"
    gate.close()


@settings(deadline=None, max_examples=200)
@given(
    task=st.text(max_size=200)
    | st.text(alphabet="smile'\";-%_*./\\\0\udc80 ", max_size=40)
    | st.sampled_from(["smile'--", "smile\0", "Smile", " smile", "smile/", "smile%00", "SMILE", "*", "\uff53mile"]),
    verb=st.sampled_from(["read", "metadata", "train", "publish", "operate", "drop", ""]),
)
def test_a_task_that_was_tampered_with_is_one_that_is_not_there(door, task, verb):
    gate, header = door
    if task == "smile":
        return
    with pytest.raises(Refused) as refused:
        gate.admit(header, task=task, verb=verb)
    assert (refused.value.status, refused.value.title) == (404, "there is no such task for this token")
