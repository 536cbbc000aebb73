import numpy as np
import pytest
from sklearn.datasets import load_digits

from tasks.datasets import DatasetOptions, open_dataset
from tasks.errors import ConfigError, UnknownNameError

FINGERPRINT = "203e5952f868e35297516c3b6801b3582896c50be2c077158b22f6f510edc3d8"


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits", image_size=16)


def test_there_are_1797_images_of_the_asked_size(digits):
    assert digits.images.shape == (1797, 16, 16, 3)
    assert digits.name == "digits"
    assert len(digits) == 1797
    assert digits.skipped == ()
    assert digits.groups is None


def test_at_eight_pixels_they_are_the_scans_themselves():
    pixels = open_dataset("digits", image_size=8).images
    scans = load_digits().images
    assert np.array_equal(pixels[..., 0], np.rint(scans * 255 / 16))
    assert pixels.max() == 255
    assert all(np.array_equal(pixels[..., 0], pixels[..., channel]) for channel in (1, 2))


def test_enlarging_keeps_each_scans_mean_grey():
    small, large = (open_dataset("digits", image_size=s).images[:50].mean(axis=(1, 2, 3)) for s in (8, 64))
    assert np.abs(small - large).max() < 8


def test_every_task_follows_from_the_digit(digits):
    expected = {
        "parity": ["even", "odd"] * 5,
        "loop": ["closed" if d in (0, 6, 8, 9) else "open" for d in range(10)],
        "large": ["small"] * 5 + ["large"] * 5,
        "digit": [str(d) for d in range(10)],
    }
    truth = load_digits().target
    assert list(digits.specs) == [*expected, "thumbnail"]
    for task, names in expected.items():
        classes = digits.spec(task).classes
        assert [classes[k] for k in digits.task_labels(task)] == [names[d] for d in truth]


def test_a_thumbnail_is_the_scan_itself_in_grey(digits):
    spec, labels = digits.spec("thumbnail"), digits.task_labels("thumbnail")
    assert spec.dense and labels.shape == (1797, *spec.shape) == (1797, 1, 16, 16)
    assert (labels.min(), labels.max()) == (0, spec.levels - 1) == (0, 255)
    assert np.array_equal(labels[:, 0], digits.images[..., 0]), "images of 16 pixels a side are enlarged the same way"


def test_labels_are_int64(digits):
    assert {digits.task_labels(task).dtype for task in digits.specs} == {np.dtype(np.int64)}


def test_it_is_normalised_without_statistics_of_the_images(digits):
    assert digits.normalisation.mean == digits.normalisation.std == (0.5, 0.5, 0.5)


def test_the_fingerprint_is_of_the_content_and_the_same_everywhere(digits):
    assert digits.fingerprint == FINGERPRINT
    assert open_dataset("digits", image_size=8, options=DatasetOptions(columns=("loop",))).fingerprint == FINGERPRINT


def test_opening_it_twice_gives_the_same_bytes(digits):
    again = open_dataset("digits", image_size=16)
    assert np.array_equal(again.images, digits.images)


def test_columns_choose_the_tasks():
    table = open_dataset("digits", image_size=8, options=DatasetOptions(columns=("loop", "digit")))
    assert list(table.specs) == list(table.labels) == ["loop", "digit"]


def test_mirroring_is_off_and_cannot_be_turned_on(digits):
    assert digits.flip is False
    assert open_dataset("digits", image_size=8, options=DatasetOptions(flip=False)).flip is False
    with pytest.raises(ConfigError, match="digits cannot be mirrored: a mirrored 2 is no digit; leave --flip out"):
        open_dataset("digits", options=DatasetOptions(flip=True))


def test_there_is_nothing_to_group_by():
    with pytest.raises(ConfigError, match="digits has no column 'writer' to group by, nor any other; leave --group-by"):
        open_dataset("digits", options=DatasetOptions(group_by="writer"))


def test_an_unknown_column_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="named 'prime'; known: digit, large, loop, parity"):
        open_dataset("digits", options=DatasetOptions(columns=("prime",)))
