"""The kill matrix: whole, its cheapest rows, and that no cell is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_matrix import Row, run
from matrix_cells import Cell, cells


def _run(chosen: list[Cell], folder: Path) -> list[Row]:
    return list(run(chosen, folder))


def _said(rows: list[Row]) -> list[str]:
    return [f"{row.who}, {row.when}: {row.complaint}" for row in rows if row.complaint]


def test_every_row_has_every_column():
    names = [(cell.who, cell.when) for cell in cells()]
    assert len(set(names)) == len(names)
    for who in {who for who, _ in names}:
        assert [when for name, when in names if name == who] == ["forward", "backward", "checkpoint", "publish"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_driver_that_dies_while_it_publishes_publishes_once_and_spends_nothing_more(tmp_path):
    rows = _run([cell for cell in cells() if (cell.who, cell.when) == ("driver", "publish")], tmp_path)
    assert _said(rows) == []
    assert [(row.struck, row.starts) for row in rows] == [(6, 7)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_and_a_consumer_that_die_change_nothing_in_the_end(tmp_path):
    wanted = {("train worker", "backward"), ("consumer loop", "backward")}
    rows = _run([cell for cell in cells() if (cell.who, cell.when) in wanted], tmp_path)
    assert _said(rows) == []
    assert [(row.struck, row.starts) for row in rows] == [(1, 1), (1, 1)]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_row_of_the_kill_matrix_is_equal_to_the_undisturbed_run(tmp_path):
    rows = _run(cells(), tmp_path)
    assert _said(rows) == []
    assert [row.struck for row in rows] == [len(cell.strikes) for cell in cells()]
