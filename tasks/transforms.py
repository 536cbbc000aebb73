"""From stored images to network inputs. Axes: B images, H height, W width, C channels (3: red, green, blue)."""

import numpy as np
import torch
from torch import Tensor

from tasks.datasets.table import ImageArray, Normalisation
from tasks.errors import DataError


def to_tensor(images_BHWC: ImageArray, normalisation: Normalisation) -> Tensor:
    """(B, 3, H, W) float32, contiguous: pixels scaled to [0, 1], minus the mean, over the standard deviation.

    The result is a copy, so the images may be memory-mapped or read-only. Raises `DataError` for anything but
    (B, H, W, 3) uint8: scaled twice, an image would train without complaint.
    """
    if images_BHWC.dtype != np.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3:
        raise DataError(f"images must be (B, H, W, 3) uint8, got {images_BHWC.shape} {images_BHWC.dtype}")
    pixels = torch.from_numpy(images_BHWC.transpose(0, 3, 1, 2).astype(np.float32, order="C"))
    mean = torch.tensor(normalisation.mean).view(3, 1, 1)
    std = torch.tensor(normalisation.std).view(3, 1, 1)
    return pixels.div_(255).sub_(mean).div_(std)


def mirror(images_BCHW: Tensor) -> Tensor:
    """Left and right exchanged; the last axis is the width. Twice is the identity."""
    return images_BCHW.flip(-1)
