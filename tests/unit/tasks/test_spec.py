import json

import numpy as np
import pytest

from tasks.errors import ConfigError
from tasks.spec import TaskSpec

CLASSES = TaskSpec(name="eyes", target="eyes", classes=("open", "closed"))
MAP = TaskSpec(
    name="depth", target="depth", shape=(2, 3, 4), levels=101, head="map", loss="l1", metrics=("mean_error",)
)


@pytest.mark.parametrize("spec", [CLASSES, MAP], ids=["classes", "map"])
def test_a_task_survives_json(spec):
    assert TaskSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_task_with_classes_is_written_as_it_was_before_there_were_maps():
    assert set(CLASSES.to_json()) == {"name", "target", "classes", "head", "loss", "metrics"}


def test_labels_of_a_map_stand_for_0_to_1_and_classes_for_themselves():
    assert MAP.targets(np.array([0, 50, 100])) == pytest.approx([0, 0.5, 1])
    assert MAP.targets(np.array([0])).dtype == np.float32
    labels = np.array([0, 1])
    assert CLASSES.targets(labels) is labels
    assert (CLASSES.n_outputs, CLASSES.n_labels, CLASSES.label_shape, CLASSES.dense) == (2, 2, (), False)
    assert (MAP.n_outputs, MAP.n_labels, MAP.label_shape, MAP.dense) == (2, 101, (2, 3, 4), True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head": "classifier"}, "its head is 'map'"),
        ({"classes": ("a", "b")}, "it has no classes"),
        ({"shape": (3, 4)}, "needs a map"),
        ({"shape": (0, 3, 4)}, "needs a map"),
        ({"levels": 1}, "at least 2 levels"),
        ({"metrics": ()}, "has no metric"),
    ],
)
def test_a_map_that_says_two_things_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        TaskSpec(**{**MAP.to_json(), **changes})


def test_a_task_with_neither_classes_nor_a_map_is_refused():
    with pytest.raises(ConfigError, match="at least two"):
        TaskSpec(name="eyes", target="eyes")
