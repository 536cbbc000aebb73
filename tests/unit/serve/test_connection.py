"""What clients share: addresses, tokens, and how long they wait."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from serve.connection import Patience, read_token, retry_after
from tasks.errors import ConfigError, DataError


def test_pauses_grow_are_random_and_have_an_end():
    patience, draw = Patience(first_s=0.5, longest_s=8.0), random.Random(0)
    for attempt, most in ((0, 0.5), (1, 1.0), (3, 4.0), (10, 8.0), (5000, 8.0)):
        pauses = [patience.pause(attempt, 0.0, draw) for _ in range(200)]
        assert 0 <= min(pauses) < 0.2 * most
        assert 0.8 * most < max(pauses) <= most
    assert patience.pause(0, 20.0, draw) >= 20.0
    for wrong in ({"first_s": 0.0}, {"first_s": 9.0, "longest_s": 8.0}, {"total_s": -1.0}):
        with pytest.raises(ConfigError):
            Patience(**wrong)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0),
        ("7", 7),
        ("Wed, 25 Nov 2026 02:00:30 GMT", 30),
        ("Wed, 25 Nov 2026 01:00:00 GMT", 0),
        ("soon", 0),
        ("-5", 0),
        ("9" * 400, 0),
    ],
)
def test_retry_after_is_read_in_both_forms(value, seconds):
    assert retry_after(value, now=datetime(2026, 11, 25, 2, 0, 0, tzinfo=UTC)) == seconds


def test_a_token_is_read_from_a_file_of_its_owner_alone(tmp_path):
    path = tmp_path / "token"
    path.write_text(" mm_0_0 \n")
    path.chmod(0o600)
    assert read_token(path) == "mm_0_0"
    path.chmod(0o640)
    with pytest.raises(DataError, match="others can read the token"):
        read_token(path)
    path.chmod(0o600)
    for wrong in ("", "\n", "a b", "na\u00efve"):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(DataError, match="holds no token"):
            read_token(path)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot read the token"):
        read_token(path)
