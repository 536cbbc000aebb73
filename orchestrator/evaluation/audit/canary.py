"""Examples and networks at which DP-SGD shows all it may: what an audit trains on instead of images.

`worst_case` makes one example's clipped gradient as large and as steady as clipping allows, and every other example's
gradient orthogonal to it: the training is then the very mechanism that the accountant bounds, and its release is told
apart from that of its neighbour as well as the accountant permits, or better if something is broken.

`flipping` is the counter-example to encoder_only_paper. One example, far out, turns the un-noised head round; from then
on every other example's gradient points the other way, and no clip bounds what all of them do together.

Without the canary its place is taken by an example whose gradient is zero in every weight. So the number of examples
and the sample rate, which are public, are the same in both worlds, and the neighbours differ by one example added.
Axes: N examples, D inputs, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.encoder_training import EncoderTrainingConfig, PublicExamples
from orchestrator.inputs import EVERY
from tasks.spec import TaskSpec

TASK: Final = "canary"
SPEC: Final = TaskSpec(name=TASK, target=TASK, classes=("no", "yes"), metrics=("accuracy",))
N_TRAIN: Final = 64
"""The canary, or what stands for it, included: the last one."""

PARTS: Final = ("encoder", "modules", "heads")
"""What a training may release, in the order of the network."""


@dataclass(frozen=True, kw_only=True)
class LinearNetworks:
    """Encoder, module and head as one matrix each, all known to the attacker from the start."""

    encoder: Tensor
    """(F, D)."""
    module: Tensor
    """(F, F)."""
    head: Tensor
    """(2, F)."""

    def shape(self, image_size: int) -> tuple[int, ...]:
        """(F,)."""
        return (len(self.module),)

    def build_encoder(self, *, seed: int) -> nn.Module:
        """E."""
        return _linear(self.encoder)

    def build_modules(self, tasks: Iterable[str], image_size: int, *, seed: int) -> dict[str, nn.Module]:
        """One g_i per task."""
        return {task: _linear(self.module) for task in tasks}

    def build_heads(
        self, outputs: Mapping[str, int], image_size: int, *, seed: int, kind: str | None = None
    ) -> dict[str, nn.Module]:
        """One M_i per task, which is its own stand-in."""
        return {task: _linear(self.head) for task in outputs}


def _linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer


@dataclass(frozen=True, kw_only=True)
class VectorInputs:
    """Vectors where a training has images. The same for every subset."""

    x: Tensor
    """(N, D)."""

    def size(self, subset: str) -> int:
        """N for the training subset, 2 for the others."""
        return len(self.x) if subset == "train" else 2

    def training(self, step: int, ids: NDArray[np.int64], part: slice = EVERY) -> Tensor:
        """Of one batch, or of a part of it."""
        return self.x[torch.from_numpy(ids[part])]

    def subset(self, subset: str, start: int, stop: int) -> Tensor:
        """Some of the first examples."""
        return self.x[start:stop]


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A set of examples with a place for the canary, the network to train on it, and what the attacker looks at."""

    networks: LinearNetworks
    ordinary: Tensor
    """(N - 1, D)."""
    canary: Tensor
    """(D,)."""
    targets: NDArray[np.int64] = field(repr=False)
    """(N,), the canary's last."""
    config: EncoderTrainingConfig
    """With a learning rate so small that no loss comes near its end: gradients stay as large as they were."""
    directions: Mapping[str, Tensor]
    """Part of the release to where the canary moves its weights. The attacker's score is how far they went."""

    def inputs(self, *, with_canary: bool) -> VectorInputs:
        """Of one of the two neighbours."""
        last = self.canary if with_canary else torch.zeros_like(self.canary)
        return VectorInputs(x=torch.cat([self.ordinary, last[None]]))

    @property
    def labels(self) -> dict[str, dict[str, NDArray[np.int64]]]:
        """Task and subset to labels."""
        return {TASK: {"train": self.targets, "validation": self.targets[:2], "test": self.targets[:2]}}

    @property
    def public(self) -> PublicExamples:
        """Other people's examples, which are like the ordinary ones."""
        return PublicExamples(inputs=VectorInputs(x=self.ordinary), labels={TASK: self.targets[:-1]})


def worst_case(parts: Iterable[str]) -> Planted:
    """A canary whose gradient is at the clipping norm in each of the parts that are clipped by themselves.

    An input is (1, K unused, K shown) and a feature (1, K shown): the encoder takes the first coordinate to the first
    one, the unused to nothing at the start, and passes on what is shown. The canary is so large in the unused that its
    gradient is all there, and so large in the shown that what comes after the encoder has a large gradient as well. One
    coordinate of each would do, but AdamW divides every weight's steps by its own noise, which is known better over K.
    """
    k, unused, shown = 16, 1e6, 1e3
    encoder = torch.zeros(1 + k, 1 + 2 * k)
    encoder[1:, 1 + k :] = torch.eye(k)
    head = torch.zeros(2, 1 + k)
    head[:, 0] = torch.tensor([-1.0, 1.0])
    ordinary = torch.zeros(N_TRAIN - 1, 1 + 2 * k)
    ordinary[:, 0] = torch.tensor([1.0, -1.0]).repeat(N_TRAIN)[: N_TRAIN - 1]
    canary = torch.cat([torch.zeros(1), torch.full((k,), unused / k**0.5), torch.full((k,), shown / k**0.5)])
    directions = {
        "encoder": torch.zeros_like(encoder),
        "modules": torch.zeros(1 + k, 1 + k),
        "heads": torch.zeros_like(head),
    }
    directions["encoder"][0, 1 : 1 + k] = 1
    directions["modules"][0, 1:] = 1
    directions["heads"][:, 1:] = torch.tensor([-1.0, 1.0])[:, None]
    return Planted(
        networks=LinearNetworks(encoder=encoder, module=torch.eye(1 + k), head=head),
        ordinary=ordinary,
        canary=canary,
        targets=np.arange(N_TRAIN, dtype=np.int64) % 2,
        config=EncoderTrainingConfig(epochs=8, batch_size=N_TRAIN // 2, lr=1e-9),
        directions={part: directions[part] / directions[part].norm() for part in parts},
    )


def flipping() -> Planted:
    """A canary that turns the head's sign against all others', by a gradient larger than all of theirs together.

    Encoder, module and head are scalars: theta > 0, 1, and -w, w. AdamW moves each by about ``lr`` a step whatever the
    size of its gradient, so w starts within one step of 0 and theta farther from it than all steps reach. Every batch
    is the whole set: the head is turned by the first one.
    """
    lr = 1e-8
    ordinary, canary = 1e9, -1e14
    start = lr / 2
    return Planted(
        networks=LinearNetworks(
            encoder=torch.full((1, 1), 100 * lr), module=torch.eye(1), head=torch.tensor([[-start], [start]])
        ),
        ordinary=torch.full((N_TRAIN - 1, 1), ordinary),
        canary=torch.tensor([canary]),
        targets=np.ones(N_TRAIN, dtype=np.int64),
        config=EncoderTrainingConfig(epochs=16, batch_size=N_TRAIN, lr=lr),
        # With the canary theta goes down: the others' gradients have turned.
        directions={"encoder": -torch.ones(1, 1)},
    )
