"""`ConsumerPort` for a tenant whose process is elsewhere: what the session asks of it goes through an `Exchange`.

Neither the head nor the optimiser's state is ever sent: the tenant keeps its own states, and the session's hold only
after how many steps they were kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from orchestrator.consumer import ConsumerConfig
from orchestrator.errors import CheckpointError, ProtocolError
from orchestrator.ports import Pending, Ready
from orchestrator.privacy.bounded.bit_ledger import RELEASE_DIGEST_BYTES
from orchestrator.wire import EvaluationReport, FeatureBatch, FeatureGradient, PublicKey, SealedLabels, TaskOffer
from serve.remote.exchange import Asked, Exchange
from serve.remote.messages import (
    Array,
    Releases,
    Reply,
    batch_arrays,
    batch_fields,
    offer_fields,
    read_gradient,
    read_key,
    read_report,
    sealed_arrays,
)

PART_BYTES: Final = 4 * 2**20
"""A subset that is evaluated is sent in parts of about this size: a small device holds one at a time."""


class RemoteConsumer:
    """A tenant elsewhere. Made anew for every session; the exchange lives on."""

    def __init__(self, offer: TaskOffer, config: ConsumerConfig, exchange: Exchange, *, run: str) -> None:
        """``run``: which training this is, the same after a restart, so that the tenant finds its states again."""
        self._offer, self._config, self._exchange, self._run = offer, config, exchange, run
        self._steps_done = 0

    @property
    def task(self) -> str:
        """The task that it bought."""
        return self._offer.spec.name

    def public_key(self) -> Asked[PublicKey]:
        """The key to which its labels are to be sealed. With this a sitting begins: the tenant makes a fresh head."""
        fields = {"run": self._run, **offer_fields(self._offer, self._config)}
        plan = self._releases("begin", (), planned=self._offer.n_features)
        return self._exchange.begin(fields, lambda reply: read_key(self.task, reply), releases=plan)

    def receive_labels(self, sealed: Pending[SealedLabels]) -> Asked[None]:
        """Open and keep the labels of one subset."""
        labels = sealed.result()
        return self._exchange.ask("labels", {"subset": labels.subset}, sealed_arrays(labels), _nothing)

    def learn(self, batch: Pending[FeatureBatch]) -> Asked[FeatureGradient]:
        """Update the head once for this step and return dL/dz."""
        sent, contract = batch.result(), self._offer.contract
        self._steps_done = sent.step + 1
        return self._exchange.ask(
            "learn",
            batch_fields(sent),
            batch_arrays(sent),
            lambda reply: read_gradient(contract, reply),
            releases=self._releases("learn", sent.features),
        )

    def evaluate(self, batch: Pending[FeatureBatch]) -> Asked[EvaluationReport]:
        """Measure the head, without changing it. What comes back is what the tenant says."""
        whole = batch.result()
        n = len(whole.example_ids)
        rows = max(1, PART_BYTES // max(1, 4 * int(np.prod(self._offer.contract.shape))))
        asked: Asked[Any] | None = None
        for start in range(0, max(n, 1), rows):
            part = slice(start, start + rows)
            last = start + rows >= n
            fields = {**batch_fields(whole), "first": start == 0, "last": last}
            arrays: dict[str, Array] = {"example_ids": whole.example_ids[part], "features": whole.features[part]}
            asked = self._exchange.ask(
                "evaluate",
                fields,
                arrays,
                self._reader(whole.subset, n) if last else _nothing,
                releases=self._releases(whole.subset, whole.features[part], first=start),
            )
        assert asked is not None
        return asked

    def head(self) -> Ready:
        """None: it stays with the tenant."""
        return Ready(None)

    def state_dict(self) -> Pending[dict[str, Any]]:
        """After how many steps the tenant has kept its own state."""
        return self._exchange.ask("keep", {}, {}, lambda reply: {"kept_after": _steps(self.task, reply)})

    def load_state_dict(self, state: dict[str, Any]) -> Asked[None]:
        """Have the tenant go on from the state that it kept."""
        if "kept_after" not in state:
            raise CheckpointError(
                f"the checkpoint was made with a hosted tenant for task {self.task!r}, and its head is no remote "
                "tenant's to have: resume without --remote, or start anew"
            )
        self._steps_done = int(state["kept_after"])
        return self._exchange.ask("restore", {"steps": self._steps_done}, {}, _nothing)

    def revive(self) -> None:
        """Wait until a process of the tenant is there. Raises `PartyLostError` after the exchange's patience."""
        self._exchange.wait_for_tenant()

    def close(self) -> None:
        """Ask nothing more in this session."""
        self._exchange.forget()

    def _releases(self, what: str, features: Iterable[Array], *, first: int = 0, planned: int = 0) -> Releases | None:
        """What the ledger of bits is told of features from that place on; None where nothing bounds them.

        A digest is of the feature too, beside what its noise is a function of (`orchestrator.release`): what is sent
        again, or done again after a restart, is no new release if it is the same.
        """
        if self._offer.bits_per_feature is None:
            return None
        where = f"{self._run} {what} {self._steps_done}"
        digests = (
            hashlib.sha256(f"{where} {place} ".encode() + z.tobytes()) for place, z in enumerate(features, first)
        )
        return Releases(
            version=f"training {self._run}",
            bits_per_release=self._offer.bits_per_feature,
            digests=tuple(digest.digest()[:RELEASE_DIGEST_BYTES] for digest in digests),
            planned=planned,
        )

    def _reader(self, subset: str, n: int) -> Any:
        return lambda reply: read_report(self.task, subset=subset, n_examples=n, reply=reply)


def _nothing(reply: Reply) -> None:
    """Nothing is expected but that it was done."""


def _steps(task: str, reply: Reply) -> int:
    steps = reply.fields.get("steps")
    if not isinstance(steps, int) or steps < 0:
        raise ProtocolError(f"the tenant of task {task!r} does not say after how many steps it kept its state")
    return steps
