"""The consumer: one tenant's head for one task. It sees features and its own labels, and nothing else.

Axes: B examples; a feature's own axes follow. This module needs torch and numpy, and neither Ray nor the producer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orchestrator.errors import NonFiniteLossError, ProtocolError
from orchestrator.models.heads import HeadConfig, build_head
from orchestrator.network import cpu_state, trainable
from orchestrator.optimisation import OptimiserConfig, restore, set_learning_rate, snapshot
from orchestrator.privacy.escrow import TenantKey, open_labels
from orchestrator.sampling import derive_seed
from orchestrator.wire import (
    EvaluationReport,
    FeatureBatch,
    FeatureGradient,
    HeadWeights,
    IdArray,
    PublicKey,
    SealedLabels,
    TaskOffer,
)
from tasks.losses import loss_function
from tasks.metrics import compute_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsumerConfig:
    """How a tenant trains its head. These are the tenant's own choices."""

    head: str = "backbone"
    """``backbone``: the rest of the backbone, as the paper; ``linear``: pooling and one linear layer; ``mlp``: for
    short vectors. A task that answers with a map has a head of convolutions, whatever is said here."""
    optimiser: OptimiserConfig = OptimiserConfig()
    total_steps: int
    """Steps of the whole training, for the learning-rate schedule."""
    seed: int = 0


class Consumer:
    """Trains a head from the features that it is sent.

    A step is applied once: ``learn`` with the step that was applied last is answered from memory.
    """

    def __init__(
        self,
        offer: TaskOffer,
        config: ConsumerConfig,
        *,
        device: torch.device | None = None,
        key: TenantKey | None = None,
    ) -> None:
        """``key``: to which the labels are sealed; None makes one that dies with this consumer."""
        self._offer, self._config = offer, config
        self._device = device or torch.device("cpu")
        self._head_config = HeadConfig.for_task(
            offer.spec,
            kind=config.head,
            backbone=offer.backbone,
            split_index=offer.split_index,
            feature_shape=tuple_of_three(offer.contract.shape),
        )
        self._head = build_head(self._head_config, seed=derive_seed(config.seed, "head", self.task)).to(self._device)
        self._optimizer = config.optimiser.build(trainable(self._head))
        self._loss = loss_function(offer.spec.loss)
        self._key = key or TenantKey.generate()
        self._labels: dict[str, NDArray[np.int64]] = {}
        self._last: FeatureGradient | None = None
        self._last_step = -1

    @property
    def task(self) -> str:
        """The task that this tenant bought."""
        return self._offer.spec.name

    def public_key(self) -> PublicKey:
        """The key to which this tenant's labels are to be sealed."""
        return self._key.public_key(self.task)

    def receive_labels(self, sealed: SealedLabels) -> None:
        """Open and keep one subset's labels."""
        shape = self._offer.spec.label_shape
        self._labels[sealed.subset] = open_labels(sealed, self._key, task=self.task, subset=sealed.subset, shape=shape)

    def learn(self, batch: FeatureBatch) -> FeatureGradient:
        """One step of the head on dL/dM, and dL/dz back, for the mean loss L over the batch."""
        if self._last is not None and batch.step == self._last_step:
            return self._last
        if batch.step != self._last_step + 1:
            raise ProtocolError(f"task {self.task!r} is at step {self._last_step + 1}; it was sent step {batch.step}")
        self._check(batch)
        gradient, loss = self._step(batch) if len(batch.example_ids) else (np.zeros_like(batch.features), 0.0)
        self._last_step = batch.step
        self._last = FeatureGradient(contract=self._offer.contract, step=batch.step, gradient=gradient, loss=loss)
        return self._last

    def evaluate(self, batch: FeatureBatch) -> EvaluationReport:
        """The task's metrics on one whole subset."""
        return self.report(batch.subset, batch.example_ids, self.logits(batch))

    def report(self, subset: str, example_ids: IdArray, logits: NDArray[np.float32]) -> EvaluationReport:
        """The task's metrics of these (B, n_outputs) logits or maps (B, C, H, W), computed part by part or at once."""
        labels = self._labels_of(subset, example_ids)
        metrics = compute_metrics(self._offer.spec, logits, labels)
        return EvaluationReport(task=self.task, subset=subset, n_examples=len(labels), metrics=metrics)

    def logits(self, batch: FeatureBatch, *, chunk: int = 256) -> NDArray[np.float32]:
        """(B, n_outputs), or maps (B, C, H, W), of features that are only looked at."""
        self._check(batch)
        self._head.eval()
        with torch.no_grad():
            logits = [
                self._head(self._tensor(batch.features[i : i + chunk])).cpu().numpy()
                for i in range(0, len(batch.example_ids), chunk)
            ]
        if logits:
            return np.concatenate(logits)
        spec = self._offer.spec
        return np.zeros((0, *(spec.label_shape or (spec.n_outputs,))), np.float32)

    def head(self) -> HeadWeights:
        """The head, for publication by the operator of a hosted tenant."""
        return HeadWeights(
            task=self.task,
            state={name: value.numpy() for name, value in cpu_state(self._head).items()},
            config=self._head_config.to_json(),
        )

    def network(self) -> nn.Module:
        """A copy of the head as it is now, on the CPU and in evaluation mode."""
        return copy.deepcopy(self._head).cpu().eval()

    def state_dict(self) -> dict[str, Any]:
        """Head, optimiser and the last step that was applied. Labels and key are not in it: they are sent anew."""
        return {"head": cpu_state(self._head), "optimizer": snapshot(self._optimizer), "step": self._last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._head.load_state_dict(state["head"])
        restore(self._optimizer, state["optimizer"])
        self._last, self._last_step = None, int(state["step"])

    def _check(self, batch: FeatureBatch) -> None:
        if batch.contract != self._offer.contract:
            raise ProtocolError(f"task {self.task!r} was sent a feature of {batch.contract}")
        if batch.subset not in self._labels:
            raise ProtocolError(f"task {self.task!r} has no labels of subset {batch.subset!r}")

    def _step(self, batch: FeatureBatch) -> tuple[NDArray[np.float32], float]:
        self._head.train()
        z = self._tensor(batch.features).requires_grad_()
        labels = self._labels_of(batch.subset, batch.example_ids)
        targets = torch.from_numpy(self._offer.spec.targets(labels)).to(self._device)
        loss = self._loss(self._head(z), targets).mean()
        if not torch.isfinite(loss):
            raise NonFiniteLossError(self.task, batch.step, float(loss.detach()))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        set_learning_rate(self._optimizer, self._config.optimiser.learning_rate(batch.step, self._config.total_steps))
        self._optimizer.step()
        assert z.grad is not None
        return z.grad.to("cpu", torch.float32).numpy(), float(loss.detach())

    def _tensor(self, features: NDArray[np.float32]) -> torch.Tensor:
        # A copy: what Ray hands over is a read-only view of memory that others share.
        return torch.tensor(features, device=self._device)

    def _labels_of(self, subset: str, example_ids: IdArray) -> NDArray[np.int64]:
        labels = self._labels[subset]
        if len(example_ids) and (example_ids.min() < 0 or example_ids.max() >= len(labels)):
            raise ProtocolError(f"task {self.task!r} was sent an example id outside 0..{len(labels) - 1}")
        return labels[example_ids]


def tuple_of_three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W). Raises `ProtocolError` for a feature that is not a map."""
    if len(shape) != 3:
        raise ProtocolError(f"a head needs a feature map (C, H, W), got shape {shape}")
    return shape[0], shape[1], shape[2]


def rebuild_head(config: dict[str, Any], state: dict[str, Any]) -> nn.Module:
    """A published head, in evaluation mode."""
    head = build_head(HeadConfig.from_json(config), seed=0)
    head.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})
    return head.eval()
