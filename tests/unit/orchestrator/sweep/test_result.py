"""From trials to a front, tables, figures, files and a page."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pyarrow.parquet as pq
import pytest

from orchestrator.errors import BudgetExceededError
from orchestrator.report.page import render
from orchestrator.report.sheet import markdown
from orchestrator.sweep.document import page_of, tables_of
from orchestrator.sweep.gallery import draw
from orchestrator.sweep.objectives import chosen_objectives
from orchestrator.sweep.plan import Plan, PlannedEncoder
from orchestrator.sweep.recipe import Need
from orchestrator.sweep.records import Trial, trial_id
from orchestrator.sweep.result import Result
from orchestrator.sweep.settings import SpaceSettings, SweepSettings
from orchestrator.sweep.space import Point

SETTINGS = SweepSettings(
    private="who", tasks=("pose",), space=SpaceSettings(omega="0,1", epsilon="2,none", seeds="0,1")
)
POINTS = SETTINGS.searched.grid()


def trial(point: Point, *, status="done") -> Trial:
    """Utility falls with omega, DP and the seed; leakage with omega."""
    private = point.epsilon is not None
    values = {
        "utility": 0.9 - 0.1 * point.omega - 0.2 * private + 0.02 * point.seed,
        "leakage": 0.3 - 0.2 * point.omega,
        "epsilon": 1.99 if private else math.inf,
        "bytes": 2048.0,
        "head_mb": 44.0,
        "step_time": 0.1,
        "latency": 0.001,
    }
    return Trial(
        id=trial_id(point),
        point=point,
        status=status,
        problem="MemoryError: <b>no room</b>" if status == "failed" else "",
        values=values if status == "done" else {},
        test={"pose": {"accuracy": 0.8}} if status == "done" else {},
        reused=("encoder",),
        leaks=({"feature": "pose", "target": "who", "excess": values["leakage"]},) if status == "done" else (),
    )


PLAN = Plan(
    points=tuple(POINTS),
    n_trials=8,
    encoders=(PlannedEncoder(need=Need(5, 2.0, 0), published=False, mechanism=(1.0, 0.1, 20)),),
    exact=True,
    data="faces",
    delta=1e-3,
    spent_before=1.0,
    total=3.0,
    limit=5.0,
)


def result(trials=None) -> Result:
    return Result(
        run="r",
        catalog="faces-sweep",
        data="faces",
        space=SETTINGS.searched,
        objectives=chosen_objectives(("utility", "leakage", "epsilon")),
        plan=PLAN,
        trials=tuple(trials or map(trial, POINTS)),
        encoders_trained=4,
        spent=3.0,
        command="python pipelines/sweep.py",
        created="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )


def test_seeds_are_averaged_and_the_front_is_of_configurations():
    found = result()
    assert [len(c.trials) for c in found.configurations] == [2] * 4
    assert found.configurations[0].mean("utility") == pytest.approx(0.71)
    assert found.configurations[0].spread("utility") == pytest.approx((0.7, 0.72))
    assert len(found.front) == 4, "each gives up something for something else"
    utility, leakage, epsilon = found.objectives
    assert found.best(utility).point.configuration == (0.0, None, 6, None)
    assert found.best(leakage).point.configuration == (1.0, None, 6, None), "the first objective decides between equals"
    assert found.best(epsilon).point.configuration == (0.0, 2.0, 6, None)


def test_a_configuration_of_which_one_seed_failed_is_on_no_front():
    found = result([trial(POINTS[0], status="failed"), *map(trial, POINTS[1:])])
    assert POINTS[0].configuration not in {c.key for c in found.configurations}
    assert len(found.front) == 3 and len(found.failed) == 1


def test_json_holds_every_number_and_a_trial_survives_it():
    found = result([*map(trial, POINTS[:-1]), trial(POINTS[-1], status="failed")])
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert len(data["trials"]) == 8 and data["trials"][-1]["status"] == "failed"
    for before, after in zip(found.trials, data["trials"], strict=True):
        read = Trial.from_json(after)
        assert (read.point, read.values, read.status) == (before.point, before.values, before.status)
    assert {t["id"] for t in data["trials"] if t["on_front"]} == set(data["front"])


def test_parquet_has_a_row_a_trial():
    table = pq.read_table(
        io.BytesIO(result([*map(trial, POINTS[:-1]), trial(POINTS[-1], status="failed")]).to_parquet())
    )
    rows = table.to_pylist()
    assert len(rows) == 8
    assert rows[0]["utility"] == pytest.approx(0.7) and rows[0]["excess_pose_on_who"] == pytest.approx(0.3)
    assert rows[-1]["utility"] is None and rows[-1]["problem"].startswith("MemoryError")


def test_the_table_has_means_with_their_spread_and_says_what_each_is_best_in():
    sheet = tables_of(result())[0]
    assert sheet.names[:3] == ["split", "epsilon", "omega"]
    best = [row for row in sheet.rows if row[-1] == "utility"]
    assert [row[:4] for row in best] == [["6", "none", "0", "91.0 ±1.0"]]
    assert "4 of 4 configurations, the mean of 2 seeds" in sheet.note
    assert "91.0 ±1.0" in markdown(sheet)


def test_figures_have_every_configuration_and_ring_the_front():
    drawn = draw(result())
    axes = drawn.figures["pareto"].axes[0]
    labels = {c.get_label(): len(c.get_offsets()) for c in axes.collections if not c.get_label().startswith("_")}
    assert labels == {"without DP": 2, "epsilon 2": 2, "no other beats it": 4}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("excess leakage, points", "utility, %")
    response = drawn.figures["response"]
    assert len(response.axes) == 4, "two objectives over two parameters"
    line = response.axes[0].lines[0].get_ydata()
    assert list(line) == pytest.approx([81.0, 71.0]), "omega, mean over epsilon and seeds"
    assert response.axes[0].collections, "the band of the seeds"
    assert [label.get_text() for label in response.axes[3].get_xticklabels()] == ["2", "none"]


def test_nothing_is_drawn_of_nothing():
    found = result([trial(point, status="failed") for point in POINTS])
    assert draw(found).figures == {} and found.front == ()
    assert all(sheet.rows or sheet.title.startswith("What no other") for sheet in tables_of(found))


def test_the_page_says_what_it_cost_that_it_was_chosen_and_what_failed_and_escapes_it():
    found = result([*map(trial, POINTS[:-1]), trial(POINTS[-1], status="failed")])
    html = render(page_of(found, draw(found).pictures, versions={"python": "3.11"}))
    assert "spent epsilon 3.00 at delta 0.001" in html
    assert "no epsilon covers it" in html
    assert "1 trial(s) failed" in html and "<b>no room</b>" not in html
    assert html.count("data:image/svg+xml") == 2


def test_a_plan_over_the_limit_is_refused_with_all_numbers():
    PLAN.check()
    with pytest.raises(BudgetExceededError, match=r"from epsilon 1.00 to 3.00, and the limit is 2 "):
        dataclasses.replace(PLAN, limit=2.0).check()
