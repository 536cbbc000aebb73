"""Task losses, one value per example: whoever clips gradients per example, or weighs examples, needs them apart."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from tasks.registry import look_up

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(outputs (B, n_outputs) or (B, C, H, W), `TaskSpec.targets` of the labels) to losses (B,). Callers take the mean."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) negative log-likelihoods in nats. Pure, so `torch.func` and Opacus can differentiate it per example."""
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """(B,) mean squared errors of maps of one shape."""
    return (outputs - targets).square().flatten(1).mean(dim=1)


def l1(outputs: Tensor, targets: Tensor) -> Tensor:
    """(B,) mean absolute errors of maps of one shape."""
    return (outputs - targets).abs().flatten(1).mean(dim=1)


LOSSES: Mapping[str, LossFunction] = {"cross_entropy": cross_entropy, "mse": mse, "l1": l1}


def loss_function(name: str) -> LossFunction:
    """The loss of that name. Raises `UnknownNameError`."""
    return look_up(LOSSES, "loss", name)
