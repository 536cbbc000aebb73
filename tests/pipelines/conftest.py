"""A tiny parquet file in the true format, and flags for runs of a few seconds."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def faces(n: int = 120) -> dict[str, list]:
    """Columns of a table of n images: who (4), pose (2), glasses (2), and one column with a single class."""
    rng = np.random.default_rng(0)
    who, pose, glasses = (rng.integers(0, k, n) for k in (4, 2, 2))
    images = rng.integers(0, 30, (n, 16, 16, 3)).astype(np.uint8)
    for i in range(n):
        images[i, 3 * who[i] : 3 * who[i] + 3, 8 * pose[i] : 8 * pose[i] + 6] = 120 + 100 * glasses[i]
    return {
        "image": [png(image) for image in images],
        "who": [f"person{w}" for w in who],
        "pose": [("left", "right")[p] for p in pose],
        "glasses": [("no", "yes")[g] for g in glasses],
        "site": ["here"] * n,
    }


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., str]:
    """Writes a table, changed as asked, and returns the ``--data`` value."""

    def write(
        change: Callable[[dict[str, list]], None] = lambda _: None, name: str = "faces.parquet", rows: int | None = None
    ) -> str:
        columns = faces()
        change(columns)
        pq.write_table(pa.table(columns).slice(0, rows), tmp_path / name)
        return f"parquet:{tmp_path / name}"

    return write


@pytest.fixture
def home(tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A storage folder of its own, with an empty tracking store."""
    (tmp_path / "home").mkdir()
    shutil.copy(mlflow_template, tmp_path / "home" / "mlflow.db")
    monkeypatch.setenv("METAMORPHOSIS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "home"
