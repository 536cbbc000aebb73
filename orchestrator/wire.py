"""What may cross the boundary between the producer and a tenant, and nothing else.

An image and an open label have no type here, so they cannot be sent by mistake: labels travel only as `SealedLabels`,
and the only tensors are features and their gradients, whose shape was agreed in a `FeatureContract`.
Axes: B examples; the feature's own axes follow, as the contract says (C, H, W for a map).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import ProtocolError
from tasks.spec import TaskSpec

FloatArray = NDArray[np.float32]
IdArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureContract:
    """The shape of one task's feature, fixed before anything is sent."""

    task: str
    shape: tuple[int, ...]
    """Of one example, without the batch axis."""

    def check(self, what: str, array: FloatArray, n_examples: int) -> None:
        """Raise `ProtocolError` unless ``array`` is finite float32 of shape ``(n_examples, *shape)``."""
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            got = getattr(array, "dtype", type(array).__name__)
            raise ProtocolError(f"{what} of task {self.task!r} must be a float32 array, got {got}")
        if array.shape != (n_examples, *self.shape):
            raise ProtocolError(
                f"{what} of task {self.task!r} must have shape {(n_examples, *self.shape)}, got {array.shape}"
            )
        if not np.isfinite(array).all():
            raise ProtocolError(f"{what} of task {self.task!r} holds NaN or infinity")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOffer:
    """All that a tenant is told in order to build and train its head."""

    spec: TaskSpec
    contract: FeatureContract
    backbone: str
    split_index: int
    n_train: int
    """How many training examples there are: example ids run from 0 to ``n_train - 1``."""
    bits_per_feature: float | None = None
    """That a feature tells of its image at most; None: nothing bounds it."""
    n_features: int = 0
    """That the whole training sends, of all epochs and subsets together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicKey:
    """A tenant's X25519 public key (32 bytes), to which its labels are sealed."""

    task: str
    raw: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class SealedLabels:
    """One task's labels for one subset, readable only by the holder of the tenant's private key.

    The ciphertext is AES-256-GCM; its key is wrapped with HPKE (X25519). Task and subset are authenticated.
    """

    task: str
    subset: str
    nonce: bytes
    ciphertext: bytes
    wrapped_key: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureBatch:
    """z_i of one batch. ``example_ids`` index the sealed labels of the same subset; they say nothing else."""

    contract: FeatureContract
    step: int
    """The training step, from 0; -1 for features that are only looked at."""
    subset: str
    example_ids: IdArray
    features: FloatArray

    def __post_init__(self) -> None:
        if self.example_ids.dtype != np.int64 or self.example_ids.ndim != 1:
            raise ProtocolError("example ids must be a vector of int64")
        self.contract.check("the feature", self.features, len(self.example_ids))


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureGradient:
    """dL/dz_i, where L is the *mean* over the batch that was received; zero rows for an empty batch."""

    contract: FeatureContract
    step: int
    gradient: FloatArray
    loss: float
    """The task loss of this batch; 0.0 for an empty one. NaN is refused by the session, which names the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """How well a tenant's head does on a subset, by the metrics of its task."""

    task: str
    subset: str
    n_examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadWeights:
    """A hosted tenant's head, handed to the operator for publication. A remote tenant never sends one."""

    task: str
    state: Mapping[str, FloatArray] = field(repr=False)
    config: Mapping[str, Any]
    """What builds the same head again; see `orchestrator.models.heads.build_head`."""


MESSAGES: tuple[type, ...] = (
    FeatureContract,
    TaskOffer,
    PublicKey,
    SealedLabels,
    FeatureBatch,
    FeatureGradient,
    EvaluationReport,
    HeadWeights,
)
"""Every type that may cross; tests walk it."""
