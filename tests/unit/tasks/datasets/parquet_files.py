"""Small parquet files in the true format, for the tests of this folder."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.datasets import DatasetOptions, open_dataset
from tasks.errors import DataError


def picture(k, size=(10, 8)):
    return Image.fromarray(np.full((size[1], size[0], 3), (k % 256, k // 256, 255 - k % 256), np.uint8))


def encode(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def images(n, kind="PNG"):
    return [encode(picture(k), kind) for k in range(n)]


def content(n=12, **columns):
    return {"image": images(n), "pose": ["left", "right"] * (n // 2), **columns}


def write(folder, columns, name="faces.parquet", **options):
    path = folder / name
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def read(path, image_size=8, **options):
    return open_dataset(f"parquet:{path}", image_size=image_size, options=DatasetOptions(**options))


def refusal(path, kind=DataError, **options):
    with pytest.raises(kind) as caught:
        read(path, **options)
    return str(caught.value)
