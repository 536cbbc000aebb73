"""A minute of load, with a replica killed in it."""

from __future__ import annotations

import pytest
from load import run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_under_load_and_kills_no_answer_is_wrong_and_none_stays_out(operator):
    outcome = run(operator, minutes=1)
    assert outcome.kills == 1 and outcome.answered > 500, outcome
    assert outcome.wrong == 0 and outcome.given_up == 0, outcome
