"""Small published tasks, with tenants and streams of each test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Shop


@pytest.fixture
def shop(shop_template: Path, tmp_path: Path) -> Iterator[Shop]:
    """The catalog, with a registry and streams of its own."""
    with Shop(shop_template, tmp_path) as opened:
        yield opened
