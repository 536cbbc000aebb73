"""Errors read the same after a journey between processes."""

import pickle

import pytest

from orchestrator import errors

SAMPLES = [
    errors.AlreadyPublishedError("loop", "3"),
    errors.UnknownNameError("task", "lop", {"loop", "digit"}),
    errors.MissingExtraError("cluster", "ray"),
    errors.NonFiniteLossError("loop", 7, float("nan")),
    errors.QuarantineError({"loop": "task 'loop' sent no gradient at step 7"}),
    errors.ConfigError("epsilon must be > 0"),
    errors.ProtocolError("wrong step"),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda e: type(e).__name__)
def test_an_error_survives_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)


def test_the_users_mistakes_exit_with_2_and_ours_with_1():
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert kind.exit_code == (2 if issubclass(kind, errors.UserError) else 1)


def test_every_error_of_the_tree_is_drawn_in_the_docstring():
    assert all(name in errors.__doc__ for name in errors.__all__)
