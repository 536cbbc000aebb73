"""Whether a loss treats every image by itself: what clipping per example takes for granted.

A BatchNorm is seen by its type (`orchestrator.privacy.dp.refuse_unsafe`); a loss is a function, and is tried out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from orchestrator.errors import PrivacyRefusal

MeanLoss = Callable[[Tensor], Tensor]
"""(B, ...) to the mean over B examples of a loss. Whatever else it needs is a function of the position in the batch."""

_COMPANIES: Final = ((2, 1.0), (5, 1.0), (5, 30.0), (5, 1e-3))
"""(examples, scale of all but the first): in which the first example's gradient must be the same."""
_TOLERANCE: Final = 1e-3
"""Relative: far above rounding, far below what a statistic of the batch does."""


def refuse_coupled(what: str, mean_loss: MeanLoss, shape: Sequence[int]) -> None:
    """Raise `PrivacyRefusal` if one example's gradient depends on which others are in its batch.

    ``shape`` is one example's. A probe, not a proof: it finds statistics, ranges and pairs over the batch, not a
    dependence that only shows on special values.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, *shape, generator=generator)
    gradients = []
    for size, scale in _COMPANIES:
        others = scale * torch.randn(size - 1, *shape, generator=generator)
        batch = torch.cat([first, others]).requires_grad_()
        (gradient,) = torch.autograd.grad(mean_loss(batch), batch)
        gradients.append(gradient[0] * size)
    largest = max(float(g.norm()) for g in gradients)
    if any(float((g - gradients[0]).norm()) > _TOLERANCE * largest for g in gradients):
        raise PrivacyRefusal(
            f"DP-SGD cannot go through {what}: one image's gradient changes with the others in its batch, so clipping "
            "no longer bounds what one image does; use a loss that is a mean over images, each taken by itself "
            "(no batch statistics, no ranges over the batch, no pairs of images)"
        )
