import numpy as np
import pytest

from orchestrator.errors import DataError
from orchestrator.evaluation.figures.projection import task_projection


def clouds(n, tasks):
    rng = np.random.default_rng(0)
    return {f"t{i}": (rng.normal(size=(n, 4, 2, 2)) + 20 * i).astype(np.float32) for i in range(tasks)}


def test_every_task_has_a_marker_and_the_points_of_an_image_are_joined():
    figure = task_projection(clouds(20, 3), n=15)
    ax = figure.axes[0]
    assert len(ax.patches) == 8
    assert all(len(patch.get_xy()) == 4 for patch in ax.patches)  # three corners, and the first again
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["t0", "t1", "t2"]


def test_tasks_that_are_far_apart_stay_apart_in_the_plane():
    ax = task_projection(clouds(20, 2), n=20).axes[0]
    ends = np.stack([patch.get_xy()[:2] for patch in ax.patches])
    spread = np.linalg.norm(ends - ends.mean(axis=0), axis=-1).mean()
    assert np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1).min() > spread


@pytest.mark.parametrize("features", [clouds(20, 1), clouds(9, 2), {**clouds(20, 1), "x": np.zeros((20, 3))}])
def test_what_cannot_be_compared_is_refused(features):
    with pytest.raises(DataError, match="one shape"):
        task_projection(features)
