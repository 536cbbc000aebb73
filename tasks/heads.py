"""What a head answers with: its last layer, by the kind of task."""

from collections.abc import Callable, Mapping

from torch import nn

from tasks.registry import look_up
from tasks.spec import TaskSpec


def classifier(spec: TaskSpec, in_features: int) -> nn.Module:
    """One logit per class, from a feature vector: (B, in_features) to (B, n_classes)."""
    return nn.Linear(in_features, spec.n_outputs)


HEADS: Mapping[str, Callable[[TaskSpec, int], nn.Module]] = {"classifier": classifier}


def output_layer(spec: TaskSpec, in_features: int) -> nn.Module:
    """The last layer of the task's head. Raises `UnknownNameError` when ``spec.head`` is none of `HEADS`.

    Its weights are drawn from PyTorch's generator of the moment: callers seed that, in a `torch.random.fork_rng`.
    """
    return look_up(HEADS, "head", spec.head)(spec, in_features)
