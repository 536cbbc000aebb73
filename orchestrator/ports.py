"""What the session needs of the parties, whether they live in this process, in a Ray actor or behind HTTP.

Calls return `Pending` results, so a session can hand one party's answer to the next without waiting for it:
in a Ray cluster the data then goes from actor to actor and never through the driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from orchestrator.wire import (
    EvaluationReport,
    FeatureBatch,
    FeatureGradient,
    HeadWeights,
    PublicKey,
    SealedLabels,
    TaskOffer,
)

T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """A result that may not be there yet."""

    def result(self) -> T_co:
        """Wait for it. Raises what the party raised, or `PartyLostError`."""
        ...


@dataclass(frozen=True, slots=True)
class Ready:
    """A `Pending` that is already there: what in-process parties return."""

    value: Any

    def result(self) -> Any:
        """The value itself."""
        return self.value


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one protocol step did. Stays with the producer's side."""

    step: int
    losses: Mapping[str, float]
    """Task loss of the batch, by task."""
    dissimilarity: float
    """The value of the dissimilarity term (before omega), summed over ordered pairs; 0.0 when it is off."""
    epsilon_spent: float
    """Accounted so far by this training; 0.0 without DP."""
    dissimilarity_by_pair: Mapping[str, float]
    """``"i|j"`` to the mean similarity of the unordered pair."""
    quarantined: Mapping[str, str] = field(default_factory=dict)
    """Task to the reason why it is trained no more, of every task that the guard has stopped up to this step."""


class ProducerPort(Protocol):
    """The data owner."""

    def offers(self) -> Mapping[str, TaskOffer]:
        """What each task being trained looks like to its tenant."""
        ...

    def seal_labels(self, key: PublicKey, subset: str) -> Pending[SealedLabels]:
        """The labels of ``key.task``, sealed to its tenant."""
        ...

    def features(self, step: int) -> Mapping[str, Pending[FeatureBatch]]:
        """Every task's feature of the batch of this step. Asking again for the same step gives the same batch.

        A task in quarantine has none.
        """
        ...

    def learn(self, step: int, gradients: Mapping[str, Pending[FeatureGradient]]) -> Pending[StepReport]:
        """Apply this step's gradients, once: a repeated call is answered from memory.

        With a guard, a task whose gradient is missing or not accepted is in quarantine from now on.
        """
        ...

    def evaluation_features(self, subset: str) -> Mapping[str, Pending[FeatureBatch]]:
        """Every task's feature of a whole subset, for evaluation."""
        ...

    def state_dict(self) -> Pending[dict[str, Any]]:
        """Everything needed to go on from here."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Pending[None]:
        """Go on from there."""
        ...

    def weights(self) -> dict[str, Any]:
        """The network's weights, for publication."""
        ...

    def revive(self) -> None:
        """Wait until the party answers again after it was lost: as it was at its start, without labels or state.

        Raises `PartyLostError` if it does not come back. A party that was not lost just answers.
        """
        ...

    def close(self) -> None:
        """End whatever the party runs in."""
        ...


class ConsumerPort(Protocol):
    """One tenant, for one task."""

    @property
    def task(self) -> str:
        """The task that it bought."""
        ...

    def public_key(self) -> Pending[PublicKey]:
        """The key to which its labels are to be sealed."""
        ...

    def receive_labels(self, sealed: Pending[SealedLabels]) -> Pending[None]:
        """Open and keep the labels of one subset."""
        ...

    def learn(self, batch: Pending[FeatureBatch]) -> Pending[FeatureGradient]:
        """Update the head once for this step and return dL/dz. A repeated step is answered from memory."""
        ...

    def evaluate(self, batch: Pending[FeatureBatch]) -> Pending[EvaluationReport]:
        """Measure the head, without changing it."""
        ...

    def head(self) -> Pending[HeadWeights | None]:
        """The head for publication; None: the tenant keeps it to itself."""
        ...

    def state_dict(self) -> Pending[dict[str, Any]]:
        """Everything needed to go on from here."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Pending[None]:
        """Go on from there."""
        ...

    def revive(self) -> None:
        """Wait until the party answers again after it was lost: as it was at its start, without labels or state.

        Raises `PartyLostError` if it does not come back. A party that was not lost just answers.
        """
        ...

    def close(self) -> None:
        """End whatever the party runs in."""
        ...
