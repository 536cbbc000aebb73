"""A small published catalog: digits of 16x16, two tasks as maps, a bounded one, and a private attribute."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Shop, train_shop


@pytest.fixture(scope="session")
def shop_template(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Path:
    """Trained once; tests copy it or only read."""
    home = tmp_path_factory.mktemp("shop")
    shutil.copy(mlflow_template, home / "mlflow.db")
    train_shop(home)
    return home


@pytest.fixture
def shop(shop_template: Path, tmp_path: Path) -> Iterator[Shop]:
    """That catalog, with a registry and streams of its own."""
    with Shop(shop_template, tmp_path) as opened:
        yield opened
