import pickle

import pytest

from tasks.errors import UnknownNameError
from tasks.registry import look_up


def test_a_known_name_gives_what_is_registered():
    assert look_up({"a": 1, "b": 2}, "letter", "b") == 2


def test_an_unknown_name_lists_the_known_ones_in_order():
    with pytest.raises(UnknownNameError) as caught:
        look_up({"b": 2, "a": 1}, "letter", "c")
    assert str(caught.value) == "no letter named 'c'; known: a, b"


def test_the_error_reads_the_same_after_pickling():
    error = UnknownNameError("letter", "c", ["a"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
