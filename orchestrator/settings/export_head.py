"""Of ``export_head.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from orchestrator.settings.shared import RuntimeSettings

_INLINE = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportHeadSettings:
    """Write a published head as an ONNX file for the edge client, checked against the one in torch.

    A tenant that trained its head elsewhere has it already: serve.edge.train writes the same kind of file.
    """

    task: Annotated[str, tyro.conf.Positional]
    """The published task."""
    data: str | None = None
    """Names the catalog by its data set, where there are several."""
    encoder_version: str = "latest"
    """Which published encoder."""
    out: Path | None = None
    """The file to write. Default: heads/TASK-VERSION.onnx in the storage folder."""
    runtime: Annotated[RuntimeSettings, _INLINE] = RuntimeSettings()
