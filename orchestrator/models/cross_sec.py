"""Cross-SEC, the metamorphosis module of MetaMorphosis (Figure 3).

Axes: B examples, C channels in k splits of c = C / k, H and W of the map.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

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


class FusedCrossSec(nn.Module):
    """A trained `CrossSec` for inference: all splits in one call of each kind, for on small maps calls are what costs.

    The arithmetic is the same, to rounding. Weights are copies, and take no gradient.
    """

    values: Tensor
    squeezes: Tensor
    expansions: Tensor
    contractions: Tensor
    order: Tensor

    def __init__(self, module: CrossSec) -> None:
        super().__init__()
        splits = len(module.values)
        layers = [[weight.flatten(1) for weight in gate.parameters()] for gate in module.gates]
        # (k, in, out), as the means of the splits are multiplied from the left.
        squeezes, expansions, contractions = (torch.stack(w).transpose(1, 2) for w in zip(*layers, strict=True))
        gated_by = [(split + module.shift) % splits for split in range(splits)]
        tensors = {
            "values": torch.cat(list(module.values.parameters())),
            "squeezes": squeezes,
            "expansions": expansions,
            "contractions": contractions,
            "order": torch.tensor(gated_by),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W), for any H and W."""
        b, channels, *_ = x.shape
        splits = len(self.order)
        mean_kBc = x.mean(dim=(2, 3)).view(b, splits, -1).transpose(0, 1)
        hidden = torch.bmm(torch.bmm(mean_kBc, self.squeezes), self.expansions).relu_()
        gates_kBc = torch.bmm(hidden, self.contractions).sigmoid_()
        gates_BC11 = gates_kBc[self.order].transpose(0, 1).reshape(b, channels, 1, 1)
        return functional.conv2d(x * gates_BC11, self.values, groups=splits)


def for_inference(module: nn.Module) -> nn.Module:
    """A copy of the module with every `CrossSec` in it fused, and nothing else changed."""
    if isinstance(module, CrossSec):
        return FusedCrossSec(module)
    fused = copy.deepcopy(module)
    for name, child in module.named_children():
        setattr(fused, name, for_inference(child))
    return fused


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
