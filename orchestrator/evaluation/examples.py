"""Reconstructions kept as pictures beside an evaluation, so that a later one can show them next to its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from orchestrator.evaluation.figures.pictures import PictureRow, picture_row
from orchestrator.evaluation.reconstruction.report import ReconstructionReport
from tasks.datasets.table import ImageArray

FILE = "pictures.npz"


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Test images, and what the best attacker made of the encoder's output for them."""

    originals: ImageArray = field(repr=False)
    """(n, S, S, 3)."""
    row: PictureRow

    @classmethod
    def of(cls, report: ReconstructionReport, feature: str, *, label: str) -> Examples | None:
        """From a report; None where it kept no pictures or every attack crashed."""
        best = report.row(feature).best
        if report.originals is None or best is None:
            return None
        return cls(originals=report.originals, row=picture_row(report, feature, best.attack, label=label))

    def save(self, folder: Path) -> None:
        """As `FILE` in that folder."""
        ssim = np.nan if self.row.ssim is None else self.row.ssim
        np.savez_compressed(
            folder / FILE, originals=self.originals, images=self.row.images, label=self.row.label, ssim=ssim
        )

    @classmethod
    def load(cls, folder: Path) -> Examples | None:
        """None where there is none: of a data set that shows people there never is, unless it was asked for."""
        path = (folder if folder.is_dir() else folder.parent) / FILE
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as kept:
            row = PictureRow(label=str(kept["label"]), images=kept["images"], ssim=float(kept["ssim"]))
            return cls(originals=kept["originals"], row=row)


def picture_rows(examples: Sequence[Examples]) -> list[PictureRow]:
    """The first one's test images, and a row for each one that shows the same images."""
    if not examples:
        return []
    first = examples[0].originals
    same = [e.row for e in examples if e.originals.shape == first.shape and np.array_equal(e.originals, first)]
    return [PictureRow(label="input", images=first), *same]
