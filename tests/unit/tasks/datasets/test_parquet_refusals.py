import os

import pyarrow as pa
import pytest
from parquet_files import content, encode, images, picture, read, refusal, write
from PIL import Image

from tasks.errors import DataError, UnknownNameError

# Files that are not usable


def test_a_missing_file_is_refused(tmp_path):
    assert f"there is no file {tmp_path}/none.parquet (seen from " in refusal(tmp_path / "none.parquet")


def test_a_folder_is_refused(tmp_path):
    assert "is a folder; the parquet source reads one file: name it, as parquet:" in refusal(tmp_path)


def test_a_home_that_does_not_exist_is_refused():
    assert "~nobody-at-all/x.parquet cannot be read (" in refusal("~nobody-at-all/x.parquet")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a device or a pipe; the parquet source needs a regular file" in refusal(tmp_path / "pipe")


def test_a_path_that_the_system_refuses_is_refused():
    assert "cannot be read (File name too long); check the path" in refusal("x" * 5000)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is empty (0 bytes); write or copy it again"),
        (b"x", "is not a parquet file: it starts with b'x' instead of b'PAR1'"),
        (b"image,pose\n", "is not a parquet file: it starts with b'imag' instead of b'PAR1'"),
        (b"PAR1", "is cut short: its 4 bytes lack a parquet footer"),
        (b"PAR1" + b"\0" * 100, "is cut short: its 104 bytes lack a parquet footer"),
        (b"PAR1" + b"\0" * 100 + b"PAR1", "is damaged or not readable by pyarrow ("),
        (b"PAR1" + b"\xff" * 100 + b"\x10\0\0\0PAR1", "is damaged or not readable by pyarrow ("),
        (b"PAR1" + b"\xff\xff\xff\x7fPAR1", "is damaged or not readable by pyarrow ("),
    ],
)
def test_what_is_no_whole_parquet_file_is_refused(tmp_path, data, text):
    path = tmp_path / "faces.parquet"
    path.write_bytes(data)
    message = refusal(path)
    assert message.startswith(f"{path} {text}")
    assert "\n" not in message


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_copy_that_was_cut_short_is_refused(tmp_path, share):
    path = write(tmp_path, content())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "is cut short" in refusal(path)


def test_a_damaged_page_is_noticed_by_its_checksum(tmp_path):
    path = write(
        tmp_path, content(), write_page_checksum=True, compression="none", use_dictionary=False, write_statistics=False
    )
    data = bytearray(path.read_bytes())
    data[data.index(b"left")] ^= 1
    path.write_bytes(data)
    assert "is damaged or not readable by pyarrow (" in refusal(path)


def test_a_damaged_column_name_is_refused(tmp_path):
    path = write(tmp_path, content())
    path.write_bytes(path.read_bytes().replace(b"pose", b"p\xffse"))
    assert "is damaged or not readable by pyarrow (" in refusal(path)


def test_a_file_without_rows_is_refused(tmp_path):
    empty = pa.table({"image": pa.array([], pa.binary()), "pose": pa.array([], pa.string())})
    assert "has no rows; a data set needs images" in refusal(write(tmp_path, empty))


def test_more_images_than_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    def no_memory(*args, **kwargs):
        raise MemoryError

    path = write(tmp_path, content())
    monkeypatch.setattr("tasks.datasets.parquet.np.empty", no_memory)
    assert "12 images of" in (message := refusal(path, image_size=1024))
    assert "at 1024x1024 need 0.0 GiB, more memory than there is: choose a smaller --image-size" in message


# Image columns that are not usable


def test_a_file_without_an_image_column_lists_its_columns(tmp_path):
    message = refusal(write(tmp_path, {"img": images(4), "pose": ["a", "b"] * 2}))
    assert "has no column 'image'; its columns: img, pose. Rename the one that holds the encoded images" in message


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a.png"] * 12, "string"),
        ([[1, 2]] * 12, "list<element: int64>"),
        ([{"path": "a.png"}] * 12, "struct<path: string>"),
        ([{"bytes": "a.png"}] * 12, "struct<bytes: string>"),
        ([1] * 12, "int64"),
    ],
)
def test_an_image_column_of_another_type_is_refused(tmp_path, values, kind):
    message = refusal(write(tmp_path, content() | {"image": values}))
    assert f"holds {kind}; it must hold the bytes of encoded images (JPEG, PNG ...) as binary" in message


def test_columns_of_the_same_name_are_refused(tmp_path):
    arrays = [pa.array(images(4)), pa.array(["a", "b"] * 2), pa.array(["c", "d"] * 2)]
    path = write(tmp_path, pa.Table.from_arrays(arrays, names=["image", "pose", "pose"]))
    assert "has more than one column named 'pose'; rename one of them" in refusal(path)


BAD_IMAGES = {
    "null": (None, "it is null"),
    "empty": (b"", "it is empty"),
    "cut short": (encode(picture(3, (200, 200)), "JPEG")[:-500], "it cannot be decoded (image file is truncated"),
    "no image": (b"not an image", "its 12 bytes are not a JPEG, PNG, WEBP, BMP, GIF or TIFF file"),
}


@pytest.mark.parametrize(("data", "why"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_one_bad_image_among_a_thousand_is_named_with_its_row_and_why(tmp_path, data, why):
    encoded = images(1000)
    encoded[777] = data
    path = write(tmp_path, {"image": encoded, "half": ["a", "b"] * 500})
    message = refusal(path)
    assert f"the image of row 777 (from 0) of {path} cannot be used: {why}" in message
    assert message.endswith("; mend it, or leave such rows out with --skip-corrupt")


@pytest.mark.parametrize(("data", "why"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_can_be_skipped_and_are_named(tmp_path, data, why):
    encoded = images(300)
    encoded[0] = encoded[299] = data
    path = write(tmp_path, {"image": encoded, "pose": ["a", "b"] * 150, "person": [k // 10 for k in range(300)]})
    table = read(path, skip_corrupt=True, group_by="person")
    assert [name.startswith(f"row {row}: {why}") for name, row in zip(table.skipped, (0, 299), strict=True)] == [
        True
    ] * 2
    assert len(table) == 298
    assert table.images[:, 0, 0, :2].tolist() == [[k % 256, k // 256] for k in range(1, 299)]
    assert table.task_labels("pose").tolist() == [1, *([0, 1] * 148), 0]
    assert table.groups.tolist() == [k // 10 for k in range(1, 299)]


def test_skipping_gives_the_table_of_a_file_without_those_rows(tmp_path):
    bad = content() | {"image": [*images(10), b"bad", b"bad"]}
    whole = {name: values[:10] for name, values in content().items()}
    skipped = read(write(tmp_path, bad), skip_corrupt=True)
    assert skipped.fingerprint == read(write(tmp_path, whole, "whole.parquet")).fingerprint


def test_a_class_whose_images_are_all_skipped_is_no_class(tmp_path):
    path = write(tmp_path, {"image": [*images(10), b"bad"], "pose": [*["a", "b"] * 5, "c"]})
    assert read(path, skip_corrupt=True).spec("pose").classes == ("a", "b")


@pytest.mark.parametrize("data", [None, b"bad"])
def test_a_file_of_nothing_but_bad_images_is_refused_even_when_skipping(tmp_path, data):
    path = write(tmp_path, content() | {"image": pa.array([data] * 12, pa.binary())})
    assert f"none of the 12 images of {path} can be read: row 0: it" in refusal(path, skip_corrupt=True)


def test_a_huge_image_is_refused_with_its_row(tmp_path):
    huge = encode(Image.new("1", (8000, 7000)))
    assert len(huge) < 100_000
    path = write(tmp_path, content() | {"image": [*images(11), huge]})
    assert "row 11 (from 0)" in (message := refusal(path))
    assert "it is 8000x7000 pixels, more than 50,000,000" in message


# Label columns that are not usable

BAD_COLUMNS = {
    "null": ([None, *["a", "b"] * 5, "a"], "column 'x' has no value in 1 of 12 rows, the first is row 0 (from 0)"),
    "blank": ([*["a", "b"] * 5, " ", ""], "column 'x' has no value in 2 of 12 rows, the first is row 10 (from 0)"),
    "all null": (pa.array([None] * 12, pa.string()), "column 'x' has no value in 12 of 12 rows"),
    "null number": ([*[1, 2] * 5, 1, None], "column 'x' has no value in 1 of 12 rows, the first is row 11 (from 0)"),
    "one class": (["same"] * 12, "column 'x' has one class ('same'); a task needs at least two: choose another"),
    "a name": ([f"p{k}" for k in range(12)], "column 'x' has 12 different values in 12 rows; a task's classes are"),
    "too fine": ([k % 7 for k in range(12)], "column 'x' has 7 different values in 12 rows"),
    "floats": ([0.5, 1.0] * 6, "column 'x' holds double; labels are text, whole numbers or booleans: convert it"),
    "nested": ([["a"], ["b"]] * 6, "column 'x' holds list<element: string>; labels are text"),
    "bytes": ([b"a", b"b"] * 6, "column 'x' holds binary; labels are text"),
}


@pytest.mark.parametrize(("values", "why"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_a_column_that_cannot_be_a_task_spares_the_others_and_says_why_when_asked_for(tmp_path, values, why):
    path = write(tmp_path, content(x=values))
    table = read(path)
    assert list(table.specs) == list(table.labels) == ["pose"]
    with pytest.raises(DataError) as caught:
        table.spec("x")
    assert str(caught.value).startswith(why)
    assert refusal(path, columns=("pose", "x")).startswith(f"{path}: {why}")


def test_half_as_many_classes_as_rows_are_the_most(tmp_path):
    assert len(read(write(tmp_path, content(x=[k % 6 for k in range(12)]))).spec("x").classes) == 6


def test_more_than_a_thousand_classes_are_refused(tmp_path):
    n = 2002
    path = write(tmp_path, {"image": images(1) * n, "few": [0, 1] * 1001, "many": [k % 1001 for k in range(n)]})
    with pytest.raises(DataError, match="column 'many' has 1001 different values in 2002 rows"):
        read(path).spec("many")


def test_rows_in_messages_are_those_of_the_file_also_after_skipping(tmp_path):
    path = write(tmp_path, content() | {"image": [b"bad", *images(11)], "x": [*["a", "b"] * 5, "a", None]})
    with pytest.raises(DataError, match=r"in 1 of 11 rows, the first is row 11 \(from 0\)"):
        read(path, skip_corrupt=True).spec("x")


def test_a_column_that_cannot_name_a_task_is_to_be_renamed(tmp_path):
    table = read(write(tmp_path, {**content(), "head pose (deg)": [1, 2] * 6}))
    with pytest.raises(DataError, match=r"column 'head pose \(deg\)' cannot name a task; rename it: task name"):
        table.spec("head pose (deg)")


def test_columns_that_would_be_the_same_task_are_to_be_renamed(tmp_path):
    path = write(tmp_path, content(Age=[1, 2] * 6, AGE=[3, 4] * 6))
    table = read(path)
    assert list(table.specs) == list(table.labels) == ["pose"]
    with pytest.raises(DataError, match="columns 'Age' and 'AGE' would all be task 'age': rename all but one"):
        table.spec("age")
    assert read(path, columns=("AGE",)).spec("age").classes == ("3", "4")


def test_an_unusable_column_does_not_hide_a_usable_one_of_the_same_task_name(tmp_path):
    table = read(write(tmp_path, content(Age=[0.5] * 12, age=[3, 4] * 6)))
    assert table.spec("age").target == "age"


def test_text_that_is_not_utf8_is_refused(tmp_path):
    broken = pa.array([b"a", b"\xff"] * 6).view(pa.string())
    path = write(tmp_path, content(x=broken))
    with pytest.raises(DataError, match="column 'x' holds text that is not UTF-8: write it again"):
        read(path).spec("x")
    assert "column 'x' holds text that is not UTF-8" in refusal(path, columns=("x",))
    assert "column 'x' holds text that is not UTF-8" in refusal(path, group_by="x")


def test_a_file_without_any_usable_label_says_why(tmp_path):
    only = refusal(write(tmp_path, {"image": images(4)}))
    assert "no column of" in only
    assert "can be a task: 'image' is the only column" in only
    assert "column 'x' has one class ('a')" in refusal(write(tmp_path, {"image": images(4), "x": ["a"] * 4}))


@pytest.mark.parametrize("name", ["smile", "image", "Pose"])
def test_an_unknown_label_column_lists_the_known_ones(tmp_path, name):
    path = write(tmp_path, content(eyes=["open", "shut"] * 6, score=[0.5] * 12))
    assert refusal(path, UnknownNameError, columns=(name,)) == (
        f"no label column of {path} named {name!r}; known: eyes, pose"
    )


def test_an_unknown_task_lists_the_known_ones(tmp_path):
    with pytest.raises(UnknownNameError, match="no task named 'smile'; known: pose"):
        read(write(tmp_path, content())).spec("smile")


def test_an_unknown_column_to_group_by_lists_the_known_ones(tmp_path):
    path = write(tmp_path, content())
    for name in ("person", ""):
        message = refusal(path, UnknownNameError, group_by=name)
        assert message == f"no group_by column of {path} named {name!r}; known: pose"


def test_a_column_to_group_by_needs_a_fit_type_and_a_value_in_every_row(tmp_path):
    path = write(tmp_path, content(score=[0.5] * 12, person=[*["a", "b"] * 5, None, "a"]))
    assert "column 'score' holds double" in refusal(path, group_by="score")
    assert "group_by column 'person' of" in (message := refusal(path, group_by="person"))
    assert "has no value in row 10 (from 0); every image needs a group: fill it in" in message
