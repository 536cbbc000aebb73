"""Cross-SEC, the metamorphosis module of MetaMorphosis (Figure 3).

Axes: B examples, C channels in k splits of c = C / k, H and W of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orchestrator.errors import ConfigError


class CrossSec(nn.Module):
    """Channel attention, where every split is gated by what another split saw.

    For splits x_1 ... x_k of the channels::

        a_j = sigmoid(W2_j relu(W1_j W0_j mean(x_j)))     W0_j: c x c,  W1_j: ec x c,  W2_j: c x ec
        y_j = V_j (x_j * a_{j+1 mod k})                   V_j: c x c, a 1x1 convolution
        z   = y_1 ... y_k, one after the other

    No biases: at k = 2 and expansion e = 2 that is exactly 3 C^2 weights, which five of the paper's sizes agree on.
    W1 W0 is one linear map in function; both are kept, for the paper has "Conv-Linear-ReLU-Linear". ``cross=False``
    gates every split by itself ("SEC" of Table 11), with the same number of weights.
    """

    def __init__(self, channels: int, *, splits: int = 2, expansion: int = 2, cross: bool = True) -> None:
        super().__init__()
        if channels % splits:
            raise ConfigError(
                f"{channels} channels cannot be divided into {splits} equal splits: "
                f"use a number of splits that divides {channels}"
            )
        c = channels // splits
        self.shift = 1 if cross else 0
        self.gates = nn.ModuleList(_gate(c, expansion) for _ in range(splits))
        self.values = nn.ModuleList(nn.Conv2d(c, c, 1, bias=False) for _ in range(splits))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W), for any H and W."""
        parts = x.chunk(len(self.values), dim=1)
        gates = [gate(part)[..., None, None] for gate, part in zip(self.gates, parts, strict=True)]
        gates = gates[self.shift :] + gates[: self.shift]
        outputs = [value(part * gate) for value, part, gate in zip(self.values, parts, gates, strict=True)]
        return torch.cat(outputs, dim=1)


def _gate(channels: int, expansion: int) -> nn.Sequential:
    """(B, c, H, W) to (B, c) in (0, 1)."""
    hidden = expansion * channels
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.Flatten(),
        nn.Linear(channels, hidden, bias=False),
        nn.ReLU(),
        nn.Linear(hidden, channels, bias=False),
        nn.Sigmoid(),
    )
