"""The rate of a bounded feature as a cost of training: what s tells beyond its task's label (SPEC E.7).

    I(x; z | y) <= E_x KL( N(s(x), tau^2 I) || N(m_y, diag v_y) )        for any m_y and v_y

Both sides grow with whatever a module lets through besides y. The density follows the module: m_y is the running mean
of s in each class, and v_y its running variance plus tau^2, which is the best choice for what was seen. It needs the
task's own labels, which the producer has, and no other.

Axes: B examples, K classes, and those of one feature.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from orchestrator.privacy.bounded.channel import ChannelConfig

MEMORY: Final = 0.9
"""Of the running moments of a class, for each batch in which it occurs."""


class RatePenalty:
    """Of one task. Its state is that of the running moments."""

    def __init__(self, channel: ChannelConfig, feature_shape: tuple[int, ...], n_classes: int) -> None:
        """A task that answers with a map has one class."""
        self._channel = channel
        self._mean = torch.zeros(n_classes, *feature_shape)
        self._square = torch.zeros(n_classes, *feature_shape)
        self._seen = torch.zeros(n_classes, dtype=torch.bool)

    def __call__(self, s: Tensor, y_B: Tensor) -> Tensor:
        """(B,) nats, with gradients to s alone; the moments take the batch in first."""
        self._observe(s.detach(), y_B)
        mean, square = self._mean.to(s.device)[y_B], self._square.to(s.device)[y_B]
        tau2 = self._channel.noise**2
        variance = (square - mean.square()).clamp_min(0) + tau2
        nats = ((tau2 + (s - mean).square()) / variance + variance.log() - math.log(tau2) - 1) / 2
        return nats.flatten(1).sum(1)

    def state_dict(self) -> dict[str, Any]:
        """A copy."""
        return {"mean": self._mean.clone(), "square": self._square.clone(), "seen": self._seen.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._mean, self._square = state["mean"].clone(), state["square"].clone()
        self._seen = state["seen"].clone().bool()

    def _observe(self, s: Tensor, y_B: Tensor) -> None:
        s, y_B = s.cpu(), y_B.cpu()
        for k in y_B.unique().tolist():
            rows = s[y_B == k]
            keep = MEMORY if self._seen[k] else 0.0
            self._mean[k] = keep * self._mean[k] + (1 - keep) * rows.mean(0)
            self._square[k] = keep * self._square[k] + (1 - keep) * rows.square().mean(0)
            self._seen[k] = True
