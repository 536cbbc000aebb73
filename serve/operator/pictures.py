"""Arrays as PNG files. Axes: C channels, H and W of a map, S pixels a side of an image."""

from __future__ import annotations

import io
import math
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tasks.datasets.table import ImageArray

_SIDE: Final = 128
"""Pixels of an image, at least: a small one is enlarged so that its own pixels are seen."""
_TILE: Final = 40
"""Pixels of a map."""
_MAPS: Final = 16
"""That are drawn of one feature."""
_GAP: Final = 4


def image_png(image_SS3: ImageArray) -> bytes:
    """An image, its pixels as squares."""
    return _png(_enlarged(image_SS3, max(1, _SIDE // image_SS3.shape[0])))


def chosen_maps(z_CHW: NDArray[np.float32]) -> NDArray[np.int64]:
    """The channels that vary most over the image, the first first; of numbers (H = W = 1) all, in their order."""
    channels = np.arange(len(z_CHW))
    if z_CHW[0].size == 1 or len(z_CHW) <= _MAPS:
        return channels
    spread = z_CHW.reshape(len(z_CHW), -1).std(axis=1)
    return np.sort(np.argsort(-spread, kind="stable")[:_MAPS])


def maps_png(z_CHW: NDArray[np.float32]) -> bytes:
    """Maps in rows of eight on one scale from the least to the greatest number; numbers as a row of squares."""
    low, high = float(z_CHW.min()), float(z_CHW.max())
    scaled = (z_CHW - low) / (high - low) if high > low else np.zeros_like(z_CHW)
    coloured = _colours()[(255 * scaled).round().astype(np.uint8)]
    single = z_CHW[0].size == 1
    factor = _TILE // 2 if single else max(1, _TILE // max(z_CHW.shape[1:]))
    return _png(_in_rows([_enlarged(tile, factor) for tile in coloured], gap=1 if single else _GAP))


def _in_rows(tiles: list[NDArray[np.uint8]], *, gap: int) -> NDArray[np.uint8]:
    """One picture with transparent gaps."""
    height, width = tiles[0].shape[:2]
    columns = min(8, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    found = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for place, tile in enumerate(tiles):
        top, left = (place // columns) * (height + gap), (place % columns) * (width + gap)
        found[top : top + height, left : left + width, :3] = tile
        found[top : top + height, left : left + width, 3] = 255
    return found


def _enlarged(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


@cache
def _colours() -> NDArray[np.uint8]:
    """(256, 3): viridis, which is read in order with any colour vision."""
    from matplotlib import colormaps

    found: NDArray[np.uint8] = (255 * colormaps["viridis"](np.arange(256))[:, :3]).round().astype(np.uint8)
    return found


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
