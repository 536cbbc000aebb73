import pytest

from tasks.datasets import open_dataset
from tasks.errors import ConfigError, UnknownNameError


@pytest.mark.parametrize("source", ["celeba", "", "Digits", ":", "/data/faces"])
def test_an_unknown_source_lists_the_known_ones(source):
    with pytest.raises(UnknownNameError) as caught:
        open_dataset(source)
    assert str(caught.value) == f"no data set named {source!r}; known: digits, parquet:PATH"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("digits:8", "takes no path, got '8'; write digits"),
        ("parquet", "needs the path of a file; write parquet:PATH"),
        ("parquet:", "needs the path of a file; write parquet:PATH"),
        ("data/faces.parquet", "looks like a file; write parquet:data/faces.parquet"),
    ],
)
def test_a_source_that_is_miswritten_says_how_to_write_it(source, text):
    with pytest.raises(ConfigError) as caught:
        open_dataset(source)
    assert text in str(caught.value)


@pytest.mark.parametrize("image_size", [-1, 0, 7, 1025])
def test_an_image_size_out_of_range_is_refused(image_size):
    with pytest.raises(ConfigError, match=f"image_size must be 8 to 1024 pixels, got {image_size}"):
        open_dataset("digits", image_size=image_size)
