"""From an encoded image, which may be anything, to pixels of the training size."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tasks.datasets.table import ImageArray
from tasks.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow knows more, some of which start other programs (EPS) or are hardly ever meant."""
MAX_PIXELS = 50_000_000
"""Larger images are refused unread: a few kilobytes of PNG can unpack to gigabytes."""


def decode_image(data: bytes, image_size: int, *, max_pixels: int = MAX_PIXELS) -> ImageArray:
    """(S, S, 3) uint8 of an encoded image, shown upright, resized bilinearly without keeping its aspect (as the paper).

    Grey becomes three equal channels; transparency is dropped; an animation gives its first picture.
    Raises `DataError` with the reason, as the end of a sentence about the image. Safe to call from many threads.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise DataError(f"it is {image.width}x{image.height} pixels, more than {max_pixels:,}")
            image.load()
            with suppress(Exception):  # a damaged orientation tag says nothing about the pixels
                ImageOps.exif_transpose(image, in_place=True)
            return resize(_to_rgb(image), image_size)
    except DataError:
        raise
    except UnidentifiedImageError:
        known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise DataError(f"its {len(data):,} bytes are not a {known} file" if data else "it is empty") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"it has more than {max_pixels:,} pixels") from None
    except Exception as error:  # on arbitrary bytes, Pillow's decoders raise a dozen kinds
        raise DataError(f"it cannot be decoded ({str(error) or type(error).__name__})") from None


def resize(image: Image.Image, image_size: int) -> ImageArray:
    """(S, S, 3) uint8 of an RGB picture; bilinear, with Pillow's antialiasing when it shrinks."""
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR), dtype=np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    """What `Image.convert` gives, except where that would lose the picture or warn."""
    if image.mode.startswith("I;16"):  # convert() cuts 16-bit pixels off at 255 instead of scaling them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise DataError("its 32-bit pixels have no known range; store it with 8 or 16 bits a channel")
    if image.mode == "P" and "transparency" in image.info:  # convert("RGB") alone warns; the pixels are the same
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
