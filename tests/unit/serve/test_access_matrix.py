"""The whole matrix against the gate: tenants, tasks, verbs, versions, and every kind of token."""

from __future__ import annotations

from collections import Counter

import pytest
from access_matrix import Cell, cells, expected, failures, malformed, register

from serve.tenants.gate import Gate, Refused
from serve.tenants.registry import Registry


@pytest.fixture
def asked(tmp_path):
    """A gate, and the header of every cell."""
    with Registry(tmp_path / "tenants.db") as registry:
        header = register(registry)
    gate = Gate(tmp_path / "tenants.db")
    yield gate, header
    gate.close()


def refusal(gate, header, **what) -> Refused | None:
    try:
        gate.admit(header, **what)
    except Refused as error:
        return error
    return None


def test_everybody_gets_what_was_granted_and_nothing_else(asked):
    gate, header = asked

    def ask(cell: Cell) -> int:
        error = refusal(gate, header(cell), task=cell.task, verb=cell.verb)
        return 200 if error is None else error.status

    wrong, number = failures(ask)
    assert not wrong
    assert number == 7 * 14 * 5 * 4 * 8 == 15_680


def test_the_matrix_has_cells_of_every_outcome_and_most_are_refused():
    outcomes = Counter(expected(cell) for cell in cells())
    assert set(outcomes) == {200, 401, 404}
    assert outcomes[200] > 200
    assert outcomes[404] > outcomes[200]


def test_whoever_is_admitted_is_the_one_whose_token_it_is(asked):
    gate, header = asked
    for who, credential, tenant in (("alice", "valid", "alice"), ("dave", "other's", "camera")):
        verb = "read" if tenant == "alice" else "publish"
        admission = gate.admit(header(Cell(who, credential, "smile", verb, "1")), task="smile", verb=verb)
        assert (admission.tenant, admission.task, admission.verb) == (tenant, "smile", verb)


def test_from_outside_all_refusals_of_one_status_are_the_same(asked):
    gate, header = asked
    seen: dict[int, set[tuple]] = {}
    for cell in cells():
        error = refusal(gate, header(cell), task=cell.task, verb=cell.verb)
        if error is not None:
            seen.setdefault(error.status, set()).add((type(error), str(error), error.title, error.retry_after))
    assert {status: len(told) for status, told in seen.items()} == {401: 1, 404: 1}


def test_no_malformed_header_is_let_in(asked):
    gate, header = asked
    token = header(Cell("alice", "valid", "smile", "read", "1")).removeprefix("Bearer ")
    assert refusal(gate, f"bearer  {token}", task="smile", verb="read") is None, "the scheme has no case (RFC 9110)"
    for form in malformed(token):
        assert refusal(gate, form, task="smile", verb="read").status == 401, form[:80]
