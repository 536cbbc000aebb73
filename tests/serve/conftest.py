"""A storage folder with published tasks, and an operator who serves it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed import Operator

from serve.deployment.head import HeadFile


@pytest.fixture
def operator(shop_template: Path, tmp_path: Path) -> Iterator[Operator]:
    home = tmp_path / "home"
    shutil.copytree(shop_template, home, ignore=shutil.ignore_patterns("runs", "features"))
    operator = Operator(home)
    try:
        yield operator
    finally:
        file = HeadFile(home / "serving")
        if (head := file.read()) is not None:
            file.stop(head)
        shutil.rmtree(file.scratch, ignore_errors=True)
