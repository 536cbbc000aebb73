"""Phase 2: the protocol between one producer and its consumers.

Per step, with z_i = g_i(E(x)) and one consumer per task (MetaMorphosis, eq. 6):

    producer                     consumer i
    features(t)   -- z_i -->     learn(t): update M_i
    learn(t)      <-- dL/dz_i --
    adds omega * dS/dz_i and updates every g_i

The session waits only for the producer's report. What passes between the parties goes from one to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.errors import ProtocolError
from orchestrator.ports import ConsumerPort, ProducerPort, StepReport
from orchestrator.wire import EvaluationReport


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReport:
    """What one epoch did."""

    epoch: int
    """Counted from 1."""
    step: int
    """The last step of the epoch, counted from 0."""
    losses: Mapping[str, float]
    """Mean task loss over the epoch's steps."""
    dissimilarity: float
    """Mean value of the dissimilarity term, before omega."""
    dissimilarity_by_pair: Mapping[str, float]
    """Of the last step that measured it."""
    epsilon_spent: float
    validation: Mapping[str, EvaluationReport]


class SessionObserver(Protocol):
    """Told of progress; whatever it does, it cannot change the training."""

    def on_step(self, report: StepReport) -> None:
        """A step was applied."""
        ...

    def on_epoch(self, report: EpochReport) -> None:
        """An epoch ended and the heads were measured on the validation subset."""
        ...


SaveState = Callable[[int, dict[str, Any]], None]
"""Called with (last applied step, state) at the end of every epoch."""


class Session:
    """Trains modules and heads together, step by step."""

    def __init__(
        self,
        producer: ProducerPort,
        consumers: Sequence[ConsumerPort],
        *,
        steps_per_epoch: int,
        epochs: int,
        observers: Sequence[SessionObserver] = (),
        save: SaveState | None = None,
    ) -> None:
        self.producer = producer
        self.consumers = {consumer.task: consumer for consumer in consumers}
        if set(self.consumers) != set(producer.offers()):
            raise ProtocolError(
                f"the producer offers {sorted(producer.offers())}, the consumers bought {sorted(self.consumers)}"
            )
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs
        self.observers, self.save = observers, save
        self._step = 0

    def enrol(self, subsets: Sequence[str] = ("train", "validation")) -> None:
        """Give every tenant its own labels, sealed to its own key."""
        waiting = []
        for consumer in self.consumers.values():
            key = consumer.public_key().result()
            waiting += [consumer.receive_labels(self.producer.seal_labels(key, subset)) for subset in subsets]
        for receipt in waiting:
            receipt.result()

    def run(self) -> list[EpochReport]:
        """Train to the end, from wherever `load_state_dict` left off."""
        return [self.run_epoch() for _ in range(self._step // self.steps_per_epoch, self.epochs)]

    def run_epoch(self) -> EpochReport:
        """The steps of one epoch, then the heads' validation."""
        steps = [self.train_step() for _ in range(self.steps_per_epoch)]
        report = self._summarise(steps)
        if self.save is not None:
            self.save(report.step, self.state_dict())
        for observer in self.observers:
            observer.on_epoch(report)
        return report

    def train_step(self) -> StepReport:
        """One step of the protocol. With Ray, every line but the last returns at once."""
        step = self._step
        batches = self.producer.features(step)
        gradients = {task: consumer.learn(batches[task]) for task, consumer in self.consumers.items()}
        report = self.producer.learn(step, gradients).result()
        self._step = step + 1
        for observer in self.observers:
            observer.on_step(report)
        return report

    def evaluate(self, subset: str) -> dict[str, EvaluationReport]:
        """Every head on a whole subset."""
        batches = self.producer.evaluation_features(subset)
        pending = {task: consumer.evaluate(batches[task]) for task, consumer in self.consumers.items()}
        return {task: report.result() for task, report in pending.items()}

    def state_dict(self) -> dict[str, Any]:
        """Every party's state, between two steps."""
        return {
            "step": self._step,
            "producer": self.producer.state_dict().result(),
            "consumers": {task: consumer.state_dict().result() for task, consumer in self.consumers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Consumers that the state does not name start anew."""
        self.producer.load_state_dict(state["producer"]).result()
        for task, consumer in self.consumers.items():
            consumer.load_state_dict(state["consumers"][task]).result()
        self._step = int(state["step"])

    def _summarise(self, steps: Sequence[StepReport]) -> EpochReport:
        measured = [s for s in steps if s.dissimilarity_by_pair]
        return EpochReport(
            epoch=self._step // self.steps_per_epoch,
            step=self._step - 1,
            losses={t: sum(s.losses[t] for s in steps) / len(steps) for t in self.consumers},
            dissimilarity=sum(s.dissimilarity for s in measured) / len(measured) if measured else 0.0,
            dissimilarity_by_pair=measured[-1].dissimilarity_by_pair if measured else {},
            epsilon_spent=steps[-1].epsilon_spent,
            validation=self.evaluate("validation"),
        )
