"""What a training network is fed with: images, or a frozen encoder's features from the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.sampling import derive_seed
from tasks.datasets.table import ImageArray, Normalisation
from tasks.transforms import mirror, to_tensor

EVERY: Final = slice(None)
"""The whole of a batch."""

Rows = Mapping[str, NDArray[np.int64]]
"""Subset name to the rows of the table that belong to it, in example-id order."""


class ImageInputs:
    """Images of the training table, normalised, and mirrored with probability 1/2 in training where that is allowed."""

    def __init__(
        self,
        images: ImageArray,
        rows: Rows,
        *,
        normalisation: Normalisation,
        flip: bool,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self._images, self._rows, self._normalisation = images, rows, normalisation
        self._flip, self._seed = flip, seed
        self._device = device or torch.device("cpu")

    def size(self, subset: str) -> int:
        """How many examples the subset has."""
        return len(self._rows[subset])

    def training(self, step: int, ids: NDArray[np.int64], part: slice = EVERY) -> Tensor:
        """(B, 3, S, S) of one training batch, or of a part of it, whose images are those of the whole."""
        x = self._load(self._rows["train"][ids[part]])
        mirrored = torch.from_numpy(mirrored_ids(self._seed, step, len(ids), flip=self._flip)[part]).to(self._device)
        return torch.where(mirrored[:, None, None, None], mirror(x), x) if self._flip else x

    def subset(self, subset: str, start: int, stop: int) -> Tensor:
        """(B, 3, S, S) of rows ``start`` to ``stop`` of a subset, as they are."""
        return self._load(self._rows[subset][start:stop])

    def _load(self, rows: NDArray[np.int64]) -> Tensor:
        return to_tensor(self._images[rows], self._normalisation).to(self._device)


class CachedInputs:
    """u = E(x) of a frozen encoder, from the feature cache: of the images, and of the mirrored images.

    Both arrays are (N, C, H, W) float16 over the rows of the whole table, usually memory-mapped and shared by every
    task, session and trial that uses the encoder.
    """

    def __init__(
        self,
        features: NDArray[np.float16],
        mirrored: NDArray[np.float16] | None,
        rows: Rows,
        *,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self._features, self._mirrored, self._rows, self._seed = features, mirrored, rows, seed
        self._device = device or torch.device("cpu")

    def size(self, subset: str) -> int:
        """How many examples the subset has."""
        return len(self._rows[subset])

    def training(self, step: int, ids: NDArray[np.int64], part: slice = EVERY) -> Tensor:
        """(B, C, H, W) of one training batch, or of a part of it, whose images are those of the whole."""
        rows = self._rows["train"][ids[part]]
        u = self._features[rows]
        if self._mirrored is not None:
            chosen = mirrored_ids(self._seed, step, len(ids), flip=True)[part]
            u[chosen] = self._mirrored[rows[chosen]]
        return self._tensor(u)

    def subset(self, subset: str, start: int, stop: int) -> Tensor:
        """(B, C, H, W) of rows ``start`` to ``stop`` of a subset, of the images as they are."""
        return self._tensor(self._features[self._rows[subset][start:stop]])

    def _tensor(self, u: NDArray[np.float16]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(u)).to(self._device, torch.float32)


def mirrored_ids(seed: int, step: int, n: int, *, flip: bool) -> NDArray[np.bool_]:
    """Which examples of a step's batch are mirrored: a function of (seed, step), like the batch itself."""
    if not flip:
        return np.zeros(n, dtype=np.bool_)
    return np.random.default_rng(derive_seed(seed, "mirror", step)).random(n) < 0.5
