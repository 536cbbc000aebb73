import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet_files import content, encode, images, picture, read, write
from PIL import Image

from tasks.datasets.splits import SUBSETS, check_labels, split_rows
from tasks.datasets.table import IMAGENET
from tasks.errors import DataError

SHARED = Path(os.environ.get("METAMORPHOSIS_DATA", Path(__file__).parents[4] / ".." / "shared" / "data"))
GREY_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63600700000900082023c38c0000000049454e44ae426082"
)
"""A PNG of one pixel, written out so that no encoder's version changes it."""


# What is read


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_are_read_in_row_order_across_batches_and_threads(tmp_path, kind):
    encoded = images(600, kind)
    table = read(write(tmp_path, {"image": encoded, "half": ["a", "b"] * 300}, row_group_size=77))
    expected = [
        np.asarray(Image.open(io.BytesIO(e)).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)) for e in encoded
    ]
    assert np.array_equal(table.images, expected)
    assert table.images.dtype == np.uint8
    assert table.task_labels("half").tolist() == [0, 1] * 300


def test_a_column_becomes_a_task_named_in_lower_case(tmp_path):
    table = read(write(tmp_path, content(High_Cheekbones=["yes", "no", "no"] * 4)))
    assert set(table.specs) == {"pose", "high_cheekbones"}
    spec = table.spec("high_cheekbones")
    assert (spec.target, spec.classes) == ("High_Cheekbones", ("no", "yes"))
    assert table.labels["High_Cheekbones"].tolist() == [1, 0, 0] * 4
    assert table.labels["High_Cheekbones"].dtype == np.int64


@pytest.mark.parametrize(
    ("values", "classes", "codes"),
    [
        (pa.array([10, 9, -1] * 4), ("-1", "9", "10"), [2, 1, 0] * 4),
        (pa.array([10, 9, 200] * 4, pa.uint8()), ("9", "10", "200"), [1, 0, 2] * 4),
        (pa.array([True, False] * 6), ("false", "true"), [1, 0] * 6),
        (pa.array(["b", "B", "é"] * 4), ("B", "b", "é"), [1, 0, 2] * 4),
        (pa.array(["b", "a"] * 6, pa.large_string()), ("a", "b"), [1, 0] * 6),
        (pa.array(["b", "a"] * 6).dictionary_encode(), ("a", "b"), [1, 0] * 6),
        (pa.array([10, 9] * 6).dictionary_encode(), ("9", "10"), [1, 0] * 6),
    ],
    ids=["int64", "uint8", "bool", "text", "large text", "categories of text", "categories of numbers"],
)
def test_classes_are_the_sorted_distinct_values(tmp_path, values, classes, codes):
    table = read(write(tmp_path, content(label=values), row_group_size=5))
    assert table.spec("label").classes == classes
    assert table.task_labels("label").tolist() == codes


def test_the_image_may_be_a_struct_as_hugging_face_writes_it(tmp_path):
    nested = pa.array([{"bytes": data, "path": f"{k}.png"} for k, data in enumerate(images(12))])
    table = read(write(tmp_path, content() | {"image": nested}))
    assert np.array_equal(table.images, read(write(tmp_path, content(), "flat.parquet")).images)


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary()])
def test_the_image_may_be_any_binary_type(tmp_path, kind):
    table = read(write(tmp_path, content() | {"image": pa.array(images(12), kind)}))
    assert table.images[5, 0, 0].tolist() == [5, 0, 250]


def test_defaults_are_the_papers_normalisation_no_mirroring_and_no_groups(tmp_path):
    table = read(write(tmp_path, content()))
    assert (table.normalisation, table.flip, table.groups, table.skipped) == (IMAGENET, False, None, ())
    assert table.name == "faces"


def test_mirroring_may_be_turned_on(tmp_path):
    path = write(tmp_path, content())
    assert read(path, flip=True).flip is True
    assert read(path, flip=False).flip is False


def test_columns_choose_the_tasks(tmp_path):
    path = write(tmp_path, content(eyes=["open", "shut"] * 6, note=[0.5] * 12))
    table = read(path, columns=("eyes",))
    assert list(table.specs) == list(table.labels) == ["eyes"]


@pytest.mark.parametrize("values", [["ann", "bob", "cy"] * 4, [7, 7, 3] * 4, [f"p{k}" for k in range(12)]])
def test_group_by_gives_equal_values_equal_groups(tmp_path, values):
    groups = read(write(tmp_path, content(person=values)), group_by="person").groups
    assert groups.dtype == np.int64
    assert [[a == b for a in groups] for b in groups] == [[a == b for a in values] for b in values]


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, content())
    assert len(read("~/faces.parquet")) == 12


# The fingerprint


def test_the_fingerprint_is_the_same_in_every_version(tmp_path):
    raw = {"image": [GREY_PIXEL] * 4, "pose": ["left", "right"] * 2, "age": [30, 4, 30, 4]}
    assert read(write(tmp_path, raw)).fingerprint == (
        "081a560f205028cec9ce401e4ffd0276db167e18c9c76985b88d1728d1a902ae"
    )


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"name": "other.parquet"}, {}),
        ({"compression": "zstd"}, {}),
        ({"row_group_size": 5}, {}),
        ({"version": "1.0", "data_page_version": "2.0"}, {}),
        ({}, {"age": pa.array([3, 40, 5] * 4, pa.int8())}),
        ({}, {"pose": pa.array(["left", "right"] * 6).dictionary_encode()}),
        ({}, {"image": pa.array(images(12), pa.large_binary())}),
    ],
    ids=["name", "compression", "row groups", "version", "narrower numbers", "categories", "large binary"],
)
def test_the_fingerprint_does_not_depend_on_how_the_content_is_stored(tmp_path, options, change):
    raw = content(age=[3, 40, 5] * 4)
    assert read(write(tmp_path, raw | change, **options)).fingerprint == read(write(tmp_path, raw)).fingerprint


def test_the_fingerprint_does_not_depend_on_column_order_size_or_choice(tmp_path):
    path = write(tmp_path, content(age=[3, 40, 5] * 4))
    turned = write(tmp_path, pq.read_table(path).select(["age", "image", "pose"]), "turned.parquet")
    prints = {
        read(path).fingerprint,
        read(turned).fingerprint,
        read(path, image_size=16).fingerprint,
        read(path, columns=("pose",), flip=True, group_by="age").fingerprint,
    }
    assert len(prints) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"pose": ["right", "left"] * 6},
        {"pose": ["left", "Right"] * 6},
        {"pose": [*["left", "right"] * 5, "left", "left"]},
        {"image": [encode(picture(99)), *images(12)[1:]]},
        {"image": images(12)[::-1]},
        {"age": [3, 40] * 6},
    ],
    ids=["labels exchanged", "a class renamed", "one label", "one image", "order of images", "another column"],
)
def test_the_fingerprint_depends_on_every_image_and_label_and_their_order(tmp_path, change):
    path = write(tmp_path, content())
    assert read(write(tmp_path, content() | change, "other.parquet")).fingerprint != read(path).fingerprint


def test_the_fingerprint_tells_where_one_image_ends_and_the_next_begins(tmp_path):
    a, b, c = images(3)
    early = write(tmp_path, {"image": [a, b + c] * 2, "pose": ["left", "right"] * 2}, "early.parquet")
    late = write(tmp_path, {"image": [a + b, c] * 2, "pose": ["left", "right"] * 2}, "late.parquet")
    assert read(early).fingerprint != read(late).fingerprint


def test_reading_twice_gives_the_same_table(tmp_path):
    path = write(tmp_path, content(60), row_group_size=7)
    first, second = read(path), read(path)
    assert np.array_equal(first.images, second.images)
    assert (first.specs, first.fingerprint) == (second.specs, second.fingerprint)


# Real files, which lie beside the project


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set METAMORPHOSIS_DATA to the folder that holds {name}")
    return path


def test_cmu_faces_are_read_and_split_by_person():
    table = read(shared("cmu-faces.parquet"), image_size=32, group_by="person")
    assert table.images.shape == (624, 32, 32, 3)
    assert {task: len(spec.classes) for task, spec in table.specs.items()} == {
        "person": 20,
        "pose": 4,
        "eyes": 2,
        "expression": 4,
    }
    assert table.unusable == {}
    assert table.fingerprint == "275c6d0b9ec408ce0260e1be566d4cce045c7228d449c32bd23479f469e00d77"
    splits = split_rows(len(table), seed=0, groups=table.groups)
    people = [set(table.task_labels("person")[splits.subset(name)].tolist()) for name in SUBSETS]
    assert list(map(len, people)) == [10, 2, 4, 4]
    check_labels(table, splits, ["pose", "eyes", "expression"])
    with pytest.raises(DataError, match="no training image of task 'person' has class"):
        check_labels(table, splits, ["person"])


def test_fairface_is_read():
    table = read(shared("fairface64-test.parquet"), image_size=64)
    assert table.images.shape == (4000, 64, 64, 3)
    assert np.bincount(table.task_labels("gender")).tolist() == [1903, 2097]
    assert table.spec("gender").classes == ("Female", "Male")
    assert (len(table.spec("race").classes), len(table.spec("age").classes)) == (7, 9)
