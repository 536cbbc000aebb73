"""The parties in this process: the same ports as `orchestrator.actors`, without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.assembly import SessionPlan, build_producer
from orchestrator.consumer import Consumer, ConsumerConfig
from orchestrator.network import pick_device
from orchestrator.ports import Pending, Ready
from orchestrator.states import tensor_state
from orchestrator.wire import FeatureBatch, FeatureGradient, PublicKey, SealedLabels, TaskOffer


class LocalProducer:
    """`ProducerPort` over a `Producer` in this process."""

    def __init__(self, plan: SessionPlan) -> None:
        self.producer = build_producer(plan)

    def offers(self) -> Mapping[str, TaskOffer]:
        """What each task being trained looks like to its tenant."""
        return self.producer.offers()

    def seal_labels(self, key: PublicKey, subset: str) -> Ready:
        """The labels of ``key.task``, sealed to its tenant."""
        return Ready(self.producer.seal_labels(key, subset))

    def features(self, step: int) -> dict[str, Ready]:
        """Every task's feature of the batch of this step."""
        return {task: Ready(batch) for task, batch in self.producer.features(step).items()}

    def learn(self, step: int, gradients: Mapping[str, Pending[FeatureGradient]]) -> Ready:
        """Apply this step's gradients, once."""
        return Ready(self.producer.learn(step, {task: g.result() for task, g in gradients.items()}))

    def evaluation_features(self, subset: str) -> dict[str, Ready]:
        """Every task's feature of a whole subset."""
        return {task: Ready(batch) for task, batch in self.producer.evaluation_features(subset).items()}

    def weights(self) -> dict[str, Any]:
        """The network's weights, for publication."""
        return dict(self.producer.weights())

    def state_dict(self) -> Ready:
        """Everything needed to go on from here."""
        return Ready(self.producer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> Ready:
        """Go on from there."""
        self.producer.load_state_dict(tensor_state(state))  # saved by a Ray session, it holds arrays
        return Ready(None)

    def revive(self) -> None:
        """It lives and dies with this process."""

    def close(self) -> None:
        """Nothing to end."""


class LocalConsumer:
    """`ConsumerPort` over a `Consumer` in this process."""

    def __init__(self, offer: TaskOffer, config: ConsumerConfig, *, device: str = "auto") -> None:
        self.consumer = Consumer(offer, config, device=pick_device(device))

    @property
    def task(self) -> str:
        """The task that it bought."""
        return self.consumer.task

    def public_key(self) -> Ready:
        """The key to which its labels are to be sealed."""
        return Ready(self.consumer.public_key())

    def receive_labels(self, sealed: Pending[SealedLabels]) -> Ready:
        """Open and keep the labels of one subset."""
        self.consumer.receive_labels(sealed.result())
        return Ready(None)

    def learn(self, batch: Pending[FeatureBatch]) -> Ready:
        """Update the head once for this step and return dL/dz."""
        return Ready(self.consumer.learn(batch.result()))

    def evaluate(self, batch: Pending[FeatureBatch]) -> Ready:
        """Measure the head, without changing it."""
        return Ready(self.consumer.evaluate(batch.result()))

    def head(self) -> Ready:
        """The head for publication."""
        return Ready(self.consumer.head())

    def state_dict(self) -> Ready:
        """Everything needed to go on from here."""
        return Ready(self.consumer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> Ready:
        """Go on from there."""
        self.consumer.load_state_dict(tensor_state(state))
        return Ready(None)

    def revive(self) -> None:
        """It lives and dies with this process."""

    def close(self) -> None:
        """Nothing to end."""
