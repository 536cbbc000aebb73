import itertools
import pickle
import subprocess
import sys

import pytest
from PIL import Image

from orchestrator.evaluation.attacks.base import AttackResult
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.figures.drawing import save_figure
from orchestrator.evaluation.figures.leakage import leakage_heatmap
from orchestrator.evaluation.floors import Floor
from orchestrator.evaluation.report import AttackSummary, LeakageReport, LeakageRow


def row(feature, target, accuracy, *, swap):
    crashed = AttackResult(attack="linear", seed=0, crashed="MemoryError: no room")
    result = AttackResult(attack="linear", seed=0, correct=1, total=2, accuracy=accuracy or 0.0)
    return LeakageRow(
        feature=feature,
        target=target,
        n_test=100,
        swap=swap,
        swap_perm=swap,
        attacks=(AttackSummary(attack="linear", results=(result if accuracy is not None else crashed,)),),
        chance=0.3,
        chance_balanced=0.5,
        target_bits=1.0,
        floor=Floor(0.4, 0.4),
    )


def make_report(tasks):
    *released, private = tasks
    rows = [
        row(feature, target, 0.41 + 0.01 * j + 0.1 * i, swap=None if j == 1 else 0.2 + 0.01 * j)
        for i, feature in enumerate(released)
        for j, target in enumerate(tasks)
        if target != feature
    ]
    rows[-1] = row(released[-1], private, None, swap=0.123)
    return LeakageReport(
        rows=tuple(rows),
        own=dict.fromkeys(released, 0.974),
        private=frozenset({private}),
        targets=tuple(tasks),
        budget=AttackBudget.preset("quick"),
        seed=0,
    )


@pytest.fixture
def report():
    return make_report(("pose", "eyes", "person"))


def texts(ax):
    return {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in ax.texts}


def test_every_number_is_written_in_its_cell(report):
    swap, leak, excess = leakage_heatmap(report).axes[:3]
    own = "own\n97.4"
    assert texts(swap) == {(0, 0): own, (0, 1): "n/a", (0, 2): "22.0", (1, 0): "20.0", (1, 1): own, (1, 2): "12.3"}
    assert texts(leak) == {(0, 0): own, (0, 1): "42.0", (0, 2): "43.0", (1, 0): "51.0", (1, 1): own, (1, 2): "crashed"}
    assert texts(excess) == {
        (0, 0): own,
        (0, 1): "+2.0",
        (0, 2): "+3.0",
        (1, 0): "+11.0",
        (1, 1): own,
        (1, 2): "crashed",
    }


def test_rows_are_released_features_and_columns_all_targets_with_the_private_one_marked(report):
    first, second = leakage_heatmap(report).axes[:2]
    assert [label.get_text() for label in first.get_yticklabels()] == ["pose", "eyes"]
    assert [label.get_text() for label in second.get_xticklabels()] == ["pose", "eyes", "person\n(private)"]


@pytest.mark.parametrize(
    "tasks",
    [
        ("loop", "parity"),
        ("pose", "eyes", "person"),
        ("high_cheekbones", "smiling", "wearing_lipstick", "young", "attractive", "male"),
    ],
)
def test_no_text_overlaps_another(tasks):
    figure = leakage_heatmap(make_report(tasks))
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    for ax in figure.axes[:3]:
        cells = [text.get_window_extent(renderer) for text in ax.texts]
        boxes = [*cells, ax.title.get_window_extent(renderer), ax.xaxis.label.get_window_extent(renderer)]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    titles = [ax.title.get_window_extent(renderer) for ax in figure.axes[:3]]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(titles))


def test_saving_writes_a_png_and_an_svg_and_makes_the_folder(report, tmp_path):
    png, svg = save_figure(leakage_heatmap(report), tmp_path / "new" / "leakage.png")
    with Image.open(png) as image:
        assert image.size[0] > 500
    assert svg.read_text().count("<svg") == 1


def test_drawing_leaves_no_global_figure_behind(report, tmp_path):
    source = (
        "import sys, pickle; from pathlib import Path;"
        "from orchestrator.evaluation.figures.drawing import save_figure;"
        "from orchestrator.evaluation.figures.leakage import leakage_heatmap;"
        "save_figure(leakage_heatmap(pickle.load(open(sys.argv[1], 'rb'))), Path(sys.argv[1] + '.png'));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    saved = tmp_path / "report"
    saved.write_bytes(pickle.dumps(report))
    subprocess.run([sys.executable, "-c", source, str(saved)], check=True, timeout=120)
