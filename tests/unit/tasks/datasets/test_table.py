import numpy as np
import pytest

from tasks.datasets.table import ImageTable
from tasks.errors import DataError, UnknownNameError
from tasks.spec import TaskSpec


def table(**changes):
    content = {
        "name": "t",
        "images": np.zeros((3, 8, 8, 3), np.uint8),
        "labels": {"Pose": np.array([0, 1, 0])},
        "specs": {"pose": TaskSpec(name="pose", target="Pose", classes=("left", "right"))},
        "fingerprint": "",
        "image_set": "",
        "unusable": {"age": "column 'age' has one class ('old')"},
    }
    return ImageTable(**content | changes)


def test_a_task_is_found_with_the_labels_of_its_column():
    assert table().spec("pose").classes == ("left", "right")
    assert table().task_labels("pose").tolist() == [0, 1, 0]


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="no task named 'smile'; known: pose"):
        table().spec("smile")


@pytest.mark.parametrize("name", ["age", "Age"])
def test_a_column_that_is_no_task_says_why_when_asked_for(name):
    with pytest.raises(DataError, match=r"^column 'age' has one class \('old'\)$"):
        table().spec(name)
    with pytest.raises(DataError, match="has one class"):
        table().task_labels(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"images": np.zeros((3, 8, 8, 3), np.float32)},
        {"images": np.zeros((3, 3, 8, 8), np.uint8)},
        {"images": np.zeros((3, 8, 8), np.uint8)},
        {"labels": {"Pose": np.array([0, 1])}},
    ],
    ids=["floats", "channels first", "grey", "a label too few"],
)
def test_arrays_that_do_not_fit_are_refused(changes):
    with pytest.raises(DataError):
        table(**changes)


def test_neither_images_nor_labels_are_shown():
    assert "array" not in repr(table())
