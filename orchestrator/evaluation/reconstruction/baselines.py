"""What an attacker has who holds no feature at all, and one who only looks features up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.evaluation.attacks.base import LabelArray
from orchestrator.evaluation.attacks.maps import Standardiser, as_maps
from orchestrator.evaluation.reconstruction.base import ReconstructionInput, pixels

_CHUNK = 256


def mean_image(data: ReconstructionInput, n: int) -> Tensor:
    """The same guess for ``n`` rows: the mean of the attacker's images."""
    return pixels(data.train_x).mean(dim=0, keepdim=True).expand(n, -1, -1, -1)


def class_mean(data: ReconstructionInput, n: int, *, known: LabelArray, asked: LabelArray) -> Tensor:
    """For each of the first ``n`` rows, the mean of the attacker's images that the task's head gives the same answer.

    ``known`` (N,) are its answers for the attacker's rows, ``asked`` those for the test rows. No guess that follows
    from the answer alone has less squared error, so what is better took more than the task from the feature. An answer
    that the attacker never saw gets the mean image.
    """
    images, overall = pixels(data.train_x), mean_image(data, 1)[0]
    answers = torch.from_numpy(known)
    means = {int(k): images[answers == k].mean(dim=0) for k in answers.unique()}
    return torch.stack([means.get(int(answer), overall) for answer in asked[:n]])


def nearest_image(data: ReconstructionInput, n: int) -> Tensor:
    """For each of the first ``n`` test images, the one of the attacker's own that is nearest in L2.

    To find it one must know the test image: no look-up among the attacker's images can do better.
    """
    known = pixels(data.train_x)
    return known[_nearest(pixels(data.test_x[:n]).flatten(1), known.flatten(1))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lookup:
    """Answers with the attacker's own image whose feature is nearest: no training, and a real picture every time."""

    name: str = "lookup"

    def run(self, data: ReconstructionInput) -> Tensor:
        """(N, 3, S, S) for all test rows."""
        standardise = Standardiser.of(as_maps(data.train_z))
        known, asked = (standardise(as_maps(z)).flatten(1) for z in (data.train_z, data.test_z))
        return pixels(data.train_x)[_nearest(asked, known)]


def _nearest(asked_ND: Tensor, known_MD: Tensor) -> Tensor:
    """(N,) positions among the known."""
    length = known_MD.square().sum(dim=1)
    chunks = [length - 2 * asked_ND[i : i + _CHUNK] @ known_MD.T for i in range(0, len(asked_ND), _CHUNK)]
    return torch.cat([chunk.argmin(dim=1) for chunk in chunks])
