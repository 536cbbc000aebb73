"""Task losses, one value per example: whoever clips gradients per example, or weighs examples, needs them apart."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from tasks.registry import look_up

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, n_outputs), targets (B,) int64) to losses (B,). Callers take the mean."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) negative log-likelihoods in nats. Pure, so `torch.func` and Opacus can differentiate it per example."""
    return nn.functional.cross_entropy(logits, targets, reduction="none")


LOSSES: Mapping[str, LossFunction] = {"cross_entropy": cross_entropy}


def loss_function(name: str) -> LossFunction:
    """The loss of that name. Raises `UnknownNameError`."""
    return look_up(LOSSES, "loss", name)
