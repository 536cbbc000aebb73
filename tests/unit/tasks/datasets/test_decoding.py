import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from tasks.datasets.decoding import decode_image, resize
from tasks.errors import DataError


def scene(mode="RGB", size=(40, 30)):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width, height):
    """A PNG that announces a size and holds no pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize("image_size", [8, 30, 64])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_pixels_are_those_of_torchvisions_resize_to_a_square(kind, image_size):
    data = encode(scene(), kind)
    expected = transforms.Resize((image_size, image_size))(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data, image_size), np.asarray(expected))


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = scene(size=(16, 16))
    assert np.array_equal(decode_image(encode(image), 16), np.asarray(image))


def test_grey_becomes_three_equal_channels():
    grey = scene("L", size=(16, 16))
    pixels = decode_image(encode(grey), 16)
    assert all(np.array_equal(pixels[..., channel], np.asarray(grey)) for channel in range(3))


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA"])
def test_every_mode_gives_what_pillow_converts_to_rgb(mode):
    image = scene(mode, size=(16, 16))
    assert np.array_equal(decode_image(encode(image), 16), np.asarray(image.convert("RGB")))


def test_a_palette_with_transparency_is_read_without_a_warning():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 0])
    palette.putdata([0, 1])
    pixels = decode_image(encode(palette.resize((8, 8), Image.Resampling.NEAREST), transparency=b"\x40\x80"), 8)
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[0, 7].tolist() == [200, 100, 0]


def test_sixteen_bits_are_scaled_to_eight_and_not_cut_off():
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    pixels = decode_image(encode(Image.fromarray(ramp)), 16)
    assert np.array_equal(pixels[..., 0], np.arange(256).reshape(16, 16))


def test_floating_point_pixels_are_refused():
    with pytest.raises(DataError, match="32-bit pixels have no known range; store it with 8 or 16 bits"):
        decode_image(encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), 8)


def test_an_image_is_turned_upright_by_its_orientation_tag():
    upright = scene(size=(16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to show"
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(decode_image(encode(sideways, exif=exif.tobytes()), 16), np.asarray(upright))


def test_a_damaged_orientation_tag_does_not_spoil_the_image():
    image = scene(size=(16, 16))
    data = encode(image, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x09\x01\x12\xff\xff")
    assert np.array_equal(decode_image(data, 16), np.asarray(image))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_file_that_is_cut_short_is_refused(kind, share):
    data = encode(scene(size=(200, 200)), kind)
    with pytest.raises(DataError, match="it cannot be decoded"):
        decode_image(data[: int(len(data) * share)], 8)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "it is empty"),
        (b"hello", "its 5 bytes are not a JPEG, PNG, WEBP, BMP, GIF or TIFF file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "are not a JPEG, PNG"),
        (b"\xff\xd8\xff\xe0", "are not a JPEG, PNG"),
        (png_header(8, 8), "it cannot be decoded ("),
    ],
    ids=["empty", "text", "EPS", "four bytes of JPEG", "no pixels"],
)
def test_what_is_no_image_is_refused_with_the_reason(data, text):
    with pytest.raises(DataError) as caught:
        decode_image(data, 8)
    assert text in str(caught.value)
    assert "object at 0x" not in str(caught.value)


def test_too_many_pixels_are_refused_before_they_are_unpacked():
    with pytest.raises(DataError, match="it is 9000x9000 pixels, more than 50,000,000"):
        decode_image(png_header(9000, 9000), 8)
    with pytest.raises(DataError, match="it has more than 50,000,000 pixels"):
        decode_image(png_header(60000, 60000), 8)


def test_too_many_pixels_are_refused_also_where_pillow_only_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="it is 10000x10000 pixels, more than 50,000,000"):
            decode_image(png_header(10000, 10000), 8)


def test_pillows_own_limit_is_left_alone():
    before = Image.MAX_IMAGE_PIXELS
    decode_image(encode(scene()), 8)
    assert before == Image.MAX_IMAGE_PIXELS


WHOLE = [encode(scene(), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]


@settings(deadline=None)
@given(data=st.sampled_from(WHOLE), changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4))
def test_damaged_bytes_give_an_image_or_a_data_error(data, changes):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * (len(damaged) - 1))] = value
    try:
        pixels = decode_image(bytes(damaged), 8)
    except DataError as error:
        assert str(error)
    else:
        assert pixels.shape == (8, 8, 3)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data):
    with pytest.raises(DataError):
        decode_image(data, 8)


def test_resizing_keeps_a_constant_picture():
    assert np.array_equal(resize(Image.new("RGB", (3, 5), (9, 8, 7)), 4), np.full((4, 4, 3), (9, 8, 7), np.uint8))
