"""The parties as Ray actors, and the adapters through which a session talks to them.

The only module that makes actors. The classes with the logic are plain (`Producer`, `Consumer`); here they get a
process each. Features go from the producer's process to each consumer's through the object store, without copies and
without passing the driver; only numpy arrays travel, never torch tensors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.assembly import SessionPlan, build_producer
from orchestrator.cluster import cluster_cpus, free_cpus, use_gpu
from orchestrator.consumer import Consumer, ConsumerConfig
from orchestrator.errors import MetaMorphosisError, PartyLostError, UnavailableError
from orchestrator.memory import keep_freed_memory
from orchestrator.network import pick_device
from orchestrator.ports import Pending
from orchestrator.privacy.ledger import LedgerCharge
from orchestrator.states import plain_state, tensor_state
from orchestrator.wire import FeatureBatch, FeatureGradient, PublicKey, SealedLabels, TaskOffer

_MOST_CPUS = 1.0


_RETRY_S: Final = 0.2
_START_S: Final = 300.0
"""How long a party may wait for a free core and start: Ray itself would wait for ever, without a word."""


def cpus_each(parties: int) -> float:
    """What an actor reserves: a core, or an equal share of a cluster that has fewer cores than parties.

    The parties of a step take turns, so a share is enough; threads are set apart from it.
    """
    return min(_MOST_CPUS, round(cluster_cpus() / (parties + 1), 2))


class RayPending:
    """A result that some actor is working on."""

    def __init__(self, reference: Any, party: str, *, timeout_s: float | None = None) -> None:
        self.reference, self._party, self._timeout_s = reference, party, timeout_s

    def result(self) -> Any:
        """Wait for it. Raises what the party raised, as if it had been called in this process."""
        try:
            return ray.get(self.reference, timeout=self._timeout_s)
        except GetTimeoutError as error:
            raise UnavailableError(
                f"{self._party} did not start within {self._timeout_s or 0:.0f} s: the cluster has "
                f"{cluster_cpus():g} CPUs, {free_cpus():g} of them free. "
                "Wait for other jobs to end, or join a larger cluster with --address"
            ) from error
        except RayTaskError as error:
            cause = _our_error(error)
            if cause is not None:
                raise cause from error
            if (lost := _loss(error)) is not None:
                raise PartyLostError(f"a party that {self._party} waited for died: {first_line(lost)}") from error
            raise
        except _LOSSES as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise PartyLostError(f"{self._party} could not begin: {last_line(error)}") from error
            raise PartyLostError(f"{self._party} died: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of a message that may hold a whole remote traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_line(error: BaseException) -> str:
    """The last line of such a message: of a remote traceback, it is what was raised there."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _our_error(error: BaseException | None) -> MetaMorphosisError | None:
    """The project's own error at the bottom of Ray's wrappers: a failed argument arrives wrapped more than once."""
    while error is not None:
        if isinstance(error, MetaMorphosisError) and not isinstance(error, RayTaskError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


_LOSSES: Final = (RayActorError, WorkerCrashedError, ObjectLostError, NodeDiedError, LocalRayletDiedError)
"""What Ray raises when a process is gone, or took an answer with it."""


def _loss(error: BaseException | None) -> BaseException | None:
    """The loss of a process at the bottom of Ray's wrappers: of one whose answer was to be an argument."""
    while error is not None:
        if isinstance(error, _LOSSES):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


def unwrap(pending: Pending[Any]) -> Any:
    """What to pass to an actor: the reference itself, so that the data does not pass the driver."""
    return pending.reference if isinstance(pending, RayPending) else pending.result()


class _ProducerActor:
    """A producer in a process of its own."""

    def __init__(self, plan: SessionPlan) -> None:
        keep_freed_memory()
        self._producer = build_producer(plan)
        self._tasks = sorted(self._producer.offers())

    def offers(self) -> Mapping[str, TaskOffer]:
        return self._producer.offers()

    def seal_labels(self, key: PublicKey, subset: str) -> SealedLabels:
        return self._producer.seal_labels(key, subset)

    def features(self, step: int) -> Any:
        return self._one_by_one(self._producer.features(step))

    def learn(self, step: int, tasks: list[str], *gradients: FeatureGradient) -> Any:
        return self._producer.learn(step, dict(zip(tasks, gradients, strict=True)))

    def evaluation_features(self, subset: str) -> Any:
        return self._one_by_one(self._producer.evaluation_features(subset))

    def process_id(self) -> int:
        return os.getpid()

    def weights(self) -> Any:
        return plain_state(self._producer.weights())

    def state_dict(self) -> Any:
        return plain_state(self._producer.state_dict())

    def load_state_dict(self, state: Any) -> None:
        self._producer.load_state_dict(tensor_state(state))

    def _one_by_one(self, batches: Mapping[str, FeatureBatch]) -> Any:
        """Each task's batch as an object of its own, so that a consumer can be given its own and no other.

        Ray has to be told beforehand how many there are: None stands for that of a task in quarantine.
        """
        values = [batches.get(task) for task in self._tasks]
        return values if len(values) > 1 else values[0]


class _ConsumerActor:
    """A hosted tenant in a process of its own."""

    def __init__(self, offer: TaskOffer, config: ConsumerConfig, device: str, threads: int | None) -> None:
        import torch

        keep_freed_memory()
        if threads is not None:
            torch.set_num_threads(threads)
        self._consumer = Consumer(offer, config, device=pick_device(device))

    def public_key(self) -> PublicKey:
        return self._consumer.public_key()

    def receive_labels(self, sealed: SealedLabels) -> None:
        self._consumer.receive_labels(sealed)

    def learn(self, batch: FeatureBatch) -> FeatureGradient:
        return self._consumer.learn(batch)

    def evaluate(self, batch: FeatureBatch) -> Any:
        return self._consumer.evaluate(batch)

    def process_id(self) -> int:
        return os.getpid()

    def head(self) -> Any:
        return self._consumer.head()

    def state_dict(self) -> Any:
        return plain_state(self._consumer.state_dict())

    def load_state_dict(self, state: Any) -> None:
        self._consumer.load_state_dict(tensor_state(state))


class _RayParty:
    """What both kinds of party have in common: an actor, its state, and its end."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor, self._name = actor, name

    def state_dict(self) -> RayPending:
        """Everything needed to go on from here."""
        return self._call("state_dict")

    def load_state_dict(self, state: dict[str, Any]) -> RayPending:
        """Go on from there."""
        return self._call("load_state_dict", plain_state(state))

    def process_id(self) -> int:
        """Of the actor's process, on its node."""
        return int(self._call("process_id").result())

    def revive(self) -> None:
        """Wait for Ray to start the actor again, if it died."""
        deadline = time.monotonic() + _START_S
        while True:
            try:
                self._call("process_id", timeout_s=_START_S).result()
            except PartyLostError as error:
                # Ray says so of an actor that is being started, too; of one that is dead for good it says it is dead.
                if not isinstance(error.__cause__, ActorUnavailableError) or time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)
            else:
                return

    def close(self) -> None:
        """End the actor's process."""
        ray.kill(self._actor, no_restart=True)

    def _call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> RayPending:
        return RayPending(getattr(self._actor, method).remote(*arguments), self._name, timeout_s=timeout_s)


class RayProducer(_RayParty):
    """`ProducerPort` over an actor."""

    def __init__(self, plan: SessionPlan) -> None:
        parties = 1 + len(plan.data.specs)
        actor = ray.remote(_ProducerActor).options(**_placement(plan.device, parties))
        self._plan = ray.put(plan)  # kept: Ray starts the actor again from it
        super().__init__(actor.remote(self._plan), "the producer")
        self._offers: Mapping[str, TaskOffer] = self._call("offers", timeout_s=_START_S).result()
        self._tasks = sorted(self._offers)

    def offers(self) -> Mapping[str, TaskOffer]:
        """What each task being trained looks like to its tenant."""
        return self._offers

    def seal_labels(self, key: PublicKey, subset: str) -> RayPending:
        """The labels of ``key.task``, sealed to its tenant."""
        return self._call("seal_labels", key, subset)

    def features(self, step: int) -> dict[str, RayPending]:
        """Every task's feature of the batch of this step."""
        return self._per_task("features", step)

    def learn(self, step: int, gradients: Mapping[str, Pending[FeatureGradient]]) -> RayPending:
        """Apply this step's gradients, once."""
        return self._call("learn", step, list(gradients), *[unwrap(g) for g in gradients.values()])

    def evaluation_features(self, subset: str) -> dict[str, RayPending]:
        """Every task's feature of a whole subset."""
        return self._per_task("evaluation_features", subset)

    def weights(self) -> dict[str, Any]:
        """The network's weights, for publication."""
        state: dict[str, Any] = tensor_state(self._call("weights").result())
        return state

    def _per_task(self, method: str, argument: Any) -> dict[str, RayPending]:
        n = len(self._tasks)
        references = getattr(self._actor, method).options(num_returns=n).remote(argument)
        one_each = references if n > 1 else [references]
        return {task: RayPending(r, self._name) for task, r in zip(self._tasks, one_each, strict=True)}


class RayConsumer(_RayParty):
    """`ConsumerPort` over an actor: a hosted tenant."""

    def __init__(
        self,
        offer: TaskOffer,
        config: ConsumerConfig,
        *,
        device: str = "auto",
        threads: int | None = None,
        parties: int,
    ) -> None:
        self._task = offer.spec.name
        actor = ray.remote(_ConsumerActor).options(**_placement(device, parties))
        super().__init__(actor.remote(offer, config, device, threads), f"the consumer of task {self._task!r}")

    @property
    def task(self) -> str:
        """The task that it bought."""
        return self._task

    def public_key(self) -> RayPending:
        """The key to which its labels are to be sealed."""
        return self._call("public_key", timeout_s=_START_S)

    def receive_labels(self, sealed: Pending[SealedLabels]) -> RayPending:
        """Open and keep the labels of one subset."""
        return self._call("receive_labels", unwrap(sealed))

    def learn(self, batch: Pending[FeatureBatch]) -> RayPending:
        """Update the head once for this step and return dL/dz."""
        return self._call("learn", unwrap(batch))

    def evaluate(self, batch: Pending[FeatureBatch]) -> RayPending:
        """Measure the head, without changing it."""
        return self._call("evaluate", unwrap(batch))

    def head(self) -> RayPending:
        """The head for publication."""
        return self._call("head")


class _LedgerKeeper:
    """Charges on the machine where the ledger's file is, for whoever trains on another one."""

    def __init__(self, charge: LedgerCharge) -> None:
        self._charge = charge

    def charge(self, step: int) -> None:
        self._charge(step)


@dataclass(frozen=True)
class RayCharge:
    """A `LedgerCharge` that is made on the driver's machine, from anywhere in the cluster."""

    keeper: Any

    @classmethod
    def to(cls, charge: LedgerCharge) -> RayCharge:
        """Start what makes the charges. A charge may be repeated, so Ray starts it again whenever it dies."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        return cls(ray.remote(_LedgerKeeper).options(**options).remote(charge))

    def __call__(self, step: int) -> None:
        """Charge the step, or raise `LedgerError` or `PartyLostError`."""
        RayPending(self.keeper.charge.remote(step), "the keeper of the privacy ledger").result()


class _ProgressBoard:
    """A mailbox between a Ray Train worker and the driver, so that the driver can show progress as it happens."""

    def __init__(self) -> None:
        self._posted: list[Any] = []
        self._failed = False
        self._result: Any = None

    def post(self, message: Any) -> None:
        self._posted.append(message)
        self._failed = self._failed or isinstance(message, Exception)

    def failed(self) -> bool:
        return self._failed

    def finish(self, result: Any) -> None:
        self._result = result

    def result(self) -> Any:
        return self._result

    def take(self) -> list[Any]:
        taken, self._posted = self._posted, []
        return taken


def progress_board() -> Any:
    """A new mailbox actor."""
    return ray.remote(_ProgressBoard).options(num_cpus=0).remote()


def _placement(device: str, parties: int) -> dict[str, Any]:
    """Spread over the nodes: by default Ray fills the first one."""
    gpus = 1 / parties if use_gpu(device) else 0
    return {
        "num_cpus": cpus_each(parties),
        "num_gpus": gpus,
        "scheduling_strategy": "SPREAD",
        # Ray starts a dead actor again, as it was at its beginning; the session decides how often, and from which state
        # it goes on. A call is never repeated by Ray: what was applied is known only to the session.
        "max_restarts": -1,
        "max_task_retries": 0,
    }
