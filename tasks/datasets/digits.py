"""scikit-learn's bundled scans of handwritten digits: real images, no download.

1797 grey scans of 8x8 pixels, the test set of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits"
(UCI, 1998). The writers are not recorded, so nothing can be grouped by them.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tasks.datasets.decoding import resize
from tasks.datasets.options import DatasetOptions
from tasks.datasets.table import ImageArray, ImageTable, LabelArray, Normalisation, image_set
from tasks.errors import ConfigError, UnknownNameError
from tasks.spec import TaskSpec

HALF = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""Pixels to [-1, 1]. Fixed, not measured: a measured mean is a statistic of private images that no budget covers."""

THUMBNAIL = 16
"""Pixels a side."""
TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(name="parity", target="parity", classes=("even", "odd")),
        TaskSpec(name="loop", target="loop", classes=("open", "closed")),
        TaskSpec(name="large", target="large", classes=("small", "large")),
        TaskSpec(name="digit", target="digit", classes=tuple("0123456789")),
        TaskSpec(
            name="thumbnail",
            target="thumbnail",
            shape=(1, THUMBNAIL, THUMBNAIL),
            head="map",
            loss="mse",
            metrics=("psnr", "mean_error"),
        ),
    )
}
_CLOSED_LOOP = (0, 6, 8, 9)


def open_digits(*, image_size: int, options: DatasetOptions) -> ImageTable:
    """The digits with the tasks ``parity``, ``loop`` (has a closed loop: 0 6 8 9), ``large`` (5 to 9) and ``digit``.

    ``thumbnail`` is the simplest dense task: the image itself, in grey, at 16x16 pixels.
    """
    from sklearn.datasets import load_digits

    if options.flip:
        raise ConfigError("digits cannot be mirrored: a mirrored 2 is no digit; leave --flip out")
    if options.group_by is not None:
        raise ConfigError(f"digits has no column {options.group_by!r} to group by, nor any other; leave --group-by out")
    for column in options.columns:
        if column not in TASKS:
            raise UnknownNameError("label column of digits", column, TASKS)
    scans, digit = load_digits(return_X_y=True)
    grey = np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    digit = digit.astype(np.int64)
    chosen = options.columns or tuple(TASKS)
    labels = {**_labels(digit), "thumbnail": _thumbnails(grey)}
    return ImageTable(
        name="digits",
        images=_enlarge(grey, image_size),
        labels={name: labels[name] for name in chosen},
        specs={name: TASKS[name] for name in chosen},
        fingerprint=hashlib.sha256(b"digits" + grey.tobytes() + digit.astype("<i8").tobytes()).hexdigest(),
        image_set=image_set(hashlib.sha256(scan.tobytes()).digest() for scan in grey),
        normalisation=HALF,
    )


def _labels(digit: LabelArray) -> dict[str, LabelArray]:
    return {
        "parity": digit % 2,
        "loop": np.isin(digit, _CLOSED_LOOP).astype(np.int64),
        "large": (digit >= 5).astype(np.int64),
        "digit": digit,
    }


def _thumbnails(grey: NDArray[np.uint8]) -> LabelArray:
    """(N, 8, 8) to (N, 1, 16, 16)."""
    return np.stack([resize(Image.fromarray(scan), THUMBNAIL) for scan in grey])[:, None].astype(np.int64)


def _enlarge(grey: NDArray[np.uint8], image_size: int) -> ImageArray:
    """(N, 8, 8) to (N, S, S, 3)."""
    return np.stack([resize(Image.fromarray(scan).convert("RGB"), image_size) for scan in grey])
