"""Phase 2: the protocol between one producer and its consumers.

Per step, with z_i = g_i(E(x)) and one consumer per task (MetaMorphosis, eq. 6):

    producer                     consumer i
    features(t)   -- z_i -->     learn(t): update M_i
    learn(t)      <-- dL/dz_i --
    adds omega * dS/dz_i and updates every g_i

The session waits only for the producer's report. What passes between the parties goes from one to the other.

A consumer that fails, or whose gradient the producer's guard does not accept, is in quarantine from then on: it gets
and gives nothing more, its g_i stays as it is, and the others go on as if it were not there.

A party that dies is started again, and all parties go back to the last state that was kept: what they do again from
there is what they did, because batches, noise and mirroring are functions of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol, TypeVar

from orchestrator.errors import MetaMorphosisError, NonFiniteLossError, PartyLostError, ProtocolError
from orchestrator.ports import ConsumerPort, Pending, ProducerPort, StepReport
from orchestrator.wire import EvaluationReport, FeatureBatch, FeatureGradient, HeadWeights

T = TypeVar("T")
SUBSETS: Final = ("train", "validation", "test")
"""Of which every tenant gets its labels."""
FAULTS: Final = (ProtocolError, NonFiniteLossError)
"""With which a consumer may fail without ending the session."""


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

    def on_stage(self, title: str) -> None:
        """Something out of the ordinary: a party was lost and is started again, or a task is in quarantine."""
        ...


SaveState = Callable[[int, dict[str, Any]], None]
"""Called with (steps done, state) whenever a state is kept."""


@dataclass(frozen=True, kw_only=True)
class SessionOutcome:
    """What a session's parties hold when it is over."""

    weights: dict[str, Any]
    """Of the producer's network."""
    heads: dict[str, HeadWeights]
    """Of the tasks whose tenants are hosted; a remote one keeps its head to itself."""
    validation: dict[str, EvaluationReport]
    test: dict[str, EvaluationReport]
    quarantined: dict[str, str]
    """Task to the reason why it was stopped. It has no head and no reports here, and must not be published."""
    state: dict[str, Any]


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
        keep_every: int | None = None,
        recoveries: int = 3,
    ) -> None:
        """A state is kept at the end of every epoch, and after every ``keep_every`` steps.

        ``recoveries``: how many losses of a party are made good between two kept states before the session gives up.
        """
        self.producer = producer
        self.consumers = {consumer.task: consumer for consumer in consumers}
        if set(self.consumers) != set(producer.offers()):
            raise ProtocolError(
                f"the producer offers {sorted(producer.offers())}, the consumers bought {sorted(self.consumers)}"
            )
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs
        self.observers, self.save = observers, save
        self.keep_every, self.recoveries = keep_every, recoveries
        self._step = 0
        self._reports: list[StepReport] = []
        self._kept: dict[str, Any] | None = None
        self._lost = 0
        self.quarantined: dict[str, str] = {}

    @property
    def live(self) -> dict[str, ConsumerPort]:
        """The consumers of the tasks that are not in quarantine."""
        return {task: consumer for task, consumer in self.consumers.items() if task not in self.quarantined}

    @property
    def step(self) -> int:
        """Steps done."""
        return self._step

    def enrol(self, subsets: Sequence[str] = SUBSETS) -> None:
        """Give every tenant its own labels, sealed to its own key."""
        waiting = []
        for consumer in self.live.values():
            key = consumer.public_key().result()
            waiting += [consumer.receive_labels(self.producer.seal_labels(key, subset)) for subset in subsets]
        for receipt in waiting:
            receipt.result()

    def start(self, state: Mapping[str, Any] | None = None) -> None:
        """Give the tenants their labels, and go to ``state`` or to the beginning."""
        self.quarantined = dict((state or {}).get("quarantined", {}))
        self._surviving(self.enrol)
        if state is not None:
            self._kept = dict(state)
            self._surviving(lambda: self.load_state_dict(dict(state)))
        else:
            self._kept = self._surviving(self.state_dict)

    def run(self) -> list[EpochReport]:
        """Train to the end, from wherever `load_state_dict` left off."""
        return [self.run_epoch() for _ in range(self._step // self.steps_per_epoch, self.epochs)]

    def run_epoch(self) -> EpochReport:
        """The steps to the end of the epoch, then the heads' validation."""
        while True:
            report = self._surviving(self._to_next_stop)
            if report is not None:
                for observer in self.observers:
                    observer.on_epoch(report)
                return report

    def finish(self) -> SessionOutcome:
        """What the parties hold, for publication. They stay as they are."""
        return self._surviving(
            lambda: SessionOutcome(
                weights=self.producer.weights(),
                heads=self._heads(),
                validation=self.evaluate("validation"),
                test=self.evaluate("test"),
                quarantined=dict(self.quarantined),
                state=self.state_dict(),
            )
        )

    def _heads(self) -> dict[str, HeadWeights]:
        heads = {task: consumer.head().result() for task, consumer in self.live.items()}
        return {task: head for task, head in heads.items() if head is not None}

    def _to_next_stop(self) -> EpochReport | None:
        """Train until a state is kept; what the epoch did, if that was its end."""
        while True:
            self._reports.append(self.train_step())
            if self._step % self.steps_per_epoch == 0:
                report = self._summarise(self._reports)
                self._reports = []
                self._keep()
                return report
            if self.keep_every is not None and self._step % self.keep_every == 0:
                self._keep()
                return None

    def _keep(self) -> None:
        state = self.state_dict()
        self._kept, self._lost = state, 0
        if self.save is not None:
            self.save(self._step, state)

    def _surviving(self, work: Callable[[], T]) -> T:
        """Do some work; whenever a party is lost meanwhile, bring it back and do the work again."""
        while True:
            try:
                return work()
            except PartyLostError as error:
                self._recover(error)

    def _recover(self, error: PartyLostError) -> None:
        """All parties alive, with their labels, at the last state that was kept."""
        while True:
            self._lost += 1
            if self._lost > self.recoveries:
                raise error
            for observer in self.observers:
                observer.on_stage(f"{error}; going on from step {0 if self._kept is None else self._kept['step']}")
            try:
                self.producer.revive()
                for consumer in self.live.values():
                    consumer.revive()
                self.enrol()
                if self._kept is not None:
                    self.load_state_dict(self._kept)
            except PartyLostError as another:
                error = another
                continue
            return

    def train_step(self) -> StepReport:
        """One step of the protocol. With Ray, every line but the last returns at once."""
        step = self._step
        gradients, failed = self._gradients(self.producer.features(step))
        report = self._learn(step, gradients, failed)
        self._step = step + 1
        for task in report.quarantined.keys() - self.quarantined.keys():
            self.quarantined[task] = str(failed.get(task, report.quarantined[task]))
            for observer in self.observers:
                observer.on_stage(f"{task} is in quarantine, the others go on: {self.quarantined[task]}")
        for observer in self.observers:
            observer.on_step(report)
        return report

    def _gradients(
        self, batches: Mapping[str, Pending[FeatureBatch]]
    ) -> tuple[dict[str, Pending[FeatureGradient]], dict[str, MetaMorphosisError]]:
        """What the consumers answer, and what those raised that failed at once."""
        gradients: dict[str, Pending[FeatureGradient]] = {}
        failed: dict[str, MetaMorphosisError] = {}
        for task, consumer in self.live.items():
            try:
                gradients[task] = consumer.learn(batches[task])
            except FAULTS as error:
                failed[task] = error
        return gradients, failed

    def _learn(
        self, step: int, gradients: dict[str, Pending[FeatureGradient]], failed: dict[str, MetaMorphosisError]
    ) -> StepReport:
        """The producer's step, with the gradients of those that did not fail. Adds to ``failed`` who did so later.

        A failure in another process shows only when its result is asked for, here by the producer.
        """
        try:
            if not failed:
                return self.producer.learn(step, gradients).result()
        except FAULTS as error:
            failed.update(_failures(gradients))
            if not failed:
                raise error
        rest = {task: gradient for task, gradient in gradients.items() if task not in failed}
        first = next(iter(failed.values()))
        if not rest:
            raise first
        try:
            return self.producer.learn(step, rest).result()
        except ProtocolError as error:  # without a guard, everybody has to answer
            raise first from error

    def evaluate(self, subset: str) -> dict[str, EvaluationReport]:
        """Every head on a whole subset."""
        batches = self.producer.evaluation_features(subset)
        pending = {task: consumer.evaluate(batches[task]) for task, consumer in self.live.items()}
        return {task: report.result() for task, report in pending.items()}

    def state_dict(self) -> dict[str, Any]:
        """Every party's state, between two steps. Nothing is asked of a consumer in quarantine."""
        return {
            "step": self._step,
            "reports": [asdict(report) for report in self._reports],
            "quarantined": dict(self.quarantined),
            "producer": self.producer.state_dict().result(),
            "consumers": {task: consumer.state_dict().result() for task, consumer in self.live.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.producer.load_state_dict(state["producer"]).result()
        self.quarantined = dict(state.get("quarantined", {}))
        for task, consumer in self.live.items():
            consumer.load_state_dict(state["consumers"][task]).result()
        self._step = int(state["step"])
        self._reports = [StepReport(**report) for report in state["reports"]]

    def _summarise(self, steps: Sequence[StepReport]) -> EpochReport:
        measured = [s for s in steps if s.dissimilarity_by_pair]
        return EpochReport(
            epoch=self._step // self.steps_per_epoch,
            step=self._step - 1,
            losses={t: sum(s.losses[t] for s in steps) / len(steps) for t in self.live},
            dissimilarity=sum(s.dissimilarity for s in measured) / len(measured) if measured else 0.0,
            dissimilarity_by_pair=measured[-1].dissimilarity_by_pair if measured else {},
            epsilon_spent=steps[-1].epsilon_spent,
            validation=self.evaluate("validation"),
        )


def _failures(pending: Mapping[str, Pending[FeatureGradient]]) -> dict[str, MetaMorphosisError]:
    """What went wrong with each result that is not there."""
    failed: dict[str, MetaMorphosisError] = {}
    for task, gradient in pending.items():
        try:
            gradient.result()
        except FAULTS as error:
            failed[task] = error
    return failed
