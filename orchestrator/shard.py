"""One step's batch, worked on by several processes that hold the same weights.

Every process draws the same batch and takes every n-th example of it. What they add up is what one process would have
computed, so all of them take the same step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of every batch is this process's. More than one need PyTorch's default process group."""

    rank: int = 0
    size: int = 1

    @property
    def part(self) -> slice:
        """Of a batch."""
        return slice(self.rank, None, self.size)

    @property
    def first(self) -> bool:
        """Whether this process does what is to be done once: draws the noise, evaluates, saves."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all shards, in place, in one exchange."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradient of each trained parameter by its sum; one that this shard did not reach counts as 0."""
        if self.size == 1:
            return
        gradients = []
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        self.sum(gradients)

    def sum_numbers(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum of each number over all shards."""
        if self.size == 1:
            return dict(values)
        names = sorted(values)
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))


WHOLE: Final = Shard()
"""The only process."""
