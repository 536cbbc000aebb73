"""The tenant's process of a remote training: holds the head, the labels and the key, and does what it is asked.

It needs torch, torchvision, numpy, httpx and the base packages: no Ray, no Opacus, no MLflow.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator.checkpoints import Checkpoints, make_private
from orchestrator.consumer import Consumer, ConsumerConfig
from orchestrator.errors import MetaMorphosisError, NonFiniteLossError, ProtocolError
from orchestrator.privacy.escrow import TenantKey
from orchestrator.wire import EvaluationReport, HeadWeights, TaskOffer
from serve.codec import MEDIA_TYPE, Precision, compress
from serve.connection import Patience
from serve.edge.errors import UnreachableError
from serve.edge.link import Link, Received
from serve.remote.messages import (
    Array,
    Kind,
    Reply,
    Work,
    gradient_reply,
    key_fields,
    read_batch,
    read_offer,
    read_sealed,
    report_fields,
)

MOST_BYTES = 1 << 30
"""Of one message from the producer."""
_KEPT = 4
"""States: the producer keeps two of its own, and may have died before it wrote the last."""
_SMALLEST_COMPRESSED = 4096
_FAREWELL = Patience(total_s=30.0)
"""For the last answer: the tenant has all that it needs, and the producer may be gone."""

NOTHING_YET = 204
STALE = 412

Said = tuple[dict[str, Any], dict[str, Array]]
"""Fields and tensors of an answer."""
Choose = Callable[[ConsumerConfig], ConsumerConfig]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What the tenant has at the end. It is the only one who has the head."""

    task: str
    version: str | None
    """Of the published feature; None: nothing was published."""
    reason: str
    """Why not; empty if it was."""
    offer: TaskOffer
    head: HeadWeights = field(repr=False)
    network: nn.Module = field(repr=False)
    """The same head, to run."""
    test: EvaluationReport | None
    """None where the head was never measured on the test subset."""


class Progress:
    """Told how it goes; says nothing. To be overridden."""

    def on_begin(self, offer: TaskOffer, config: ConsumerConfig) -> None:
        """A fresh head was made."""

    def on_step(self, step: int, loss: float) -> None:
        """A step was applied."""

    def on_report(self, report: EvaluationReport) -> None:
        """The head was measured."""


class Trainer:
    """Does works in their order, each once: an answer is kept until the next work shows that it arrived."""

    def __init__(
        self,
        key: TenantKey,
        states: Path,
        *,
        task: str,
        precision: Precision = "fp32",
        device: torch.device | None = None,
        choose: Choose = lambda proposed: proposed,
        progress: Progress | None = None,
    ) -> None:
        """``states``: folder in which the head's states are kept, readable by their owner alone. ``choose`` makes the
        tenant's own settings of those that the producer proposes."""
        self.task, self._key, self._choose = task, key, choose
        self._states, self._precision, self._device = make_private(states), precision, device
        self._progress = progress or Progress()
        self.here = Reply(process=secrets.token_hex(8), precision=precision)
        """Says that the process is there, and answers nothing."""
        self.answer = self.here
        """To the last work."""
        self._table: _Table | None = None
        self._sitting = ""
        self._restored = set[int]()
        """After how many steps the producer has gone on before: there it may begin once more, whatever came since."""
        self._works: Mapping[Kind, Callable[[Work], Said]] = {
            "begin": self._begin,
            "labels": self._labels,
            "learn": self._learn,
            "evaluate": self._evaluate,
            "keep": self._keep,
            "restore": self._restore,
            "end": self._end,
        }
        self.outcome: Trained | None = None
        """Where the producer has ended the training."""

    def do(self, work: Work) -> Reply:
        """The answer to a work; the same one again for a work that was done already.

        Raises `ProtocolError` for a work that does not follow on the last.
        """
        if (work.sitting, work.number) == (self.answer.sitting, self.answer.number):
            return self.answer
        if work.number == 0 and work.kind in {"begin", "end"}:
            self._sitting = work.sitting
        elif (work.sitting, work.number) != (self._sitting, self.answer.number + 1):
            raise ProtocolError(f"the producer sent work {work.number}, and {self.answer.number + 1} was expected")
        try:
            fields, arrays = self._works[work.kind](work)
            error = ""
        except MetaMorphosisError as problem:
            fields = {"diverged_at": problem.step} if isinstance(problem, NonFiniteLossError) else {}
            arrays, error = {}, str(problem)
        self.answer = replace(
            self.here, sitting=work.sitting, number=work.number, error=error, fields=fields, arrays=arrays
        )
        return self.answer

    # -- works ---------------------------------------------------------------------------------------------------------

    def _begin(self, work: Work) -> Said:
        table = self._table = self._table_of(work.fields)
        self._progress.on_begin(table.offer, table.config)
        return key_fields(table.consumer.public_key()), {}

    def _labels(self, work: Work) -> Said:
        self._at_table.consumer.receive_labels(read_sealed(self.task, work))
        return {}, {}

    def _learn(self, work: Work) -> Said:
        table = self._at_table
        gradient = table.consumer.learn(read_batch(table.offer.contract, work))
        self._progress.on_step(gradient.step, gradient.loss)
        return gradient_reply(gradient, self._precision)

    def _evaluate(self, work: Work) -> Said:
        table = self._at_table
        batch = read_batch(table.offer.contract, work)
        if work.fields.get("first"):
            table.seen = []
        table.seen.append((batch.example_ids, table.consumer.logits(batch)))
        if not work.fields.get("last"):
            return {}, {}
        ids, logits = (np.concatenate(parts) for parts in zip(*table.seen, strict=True))
        table.seen = []
        report = table.consumer.report(batch.subset, ids, logits)
        table.reports[batch.subset] = report
        self._progress.on_report(report)
        return report_fields(report), {}

    def _keep(self, work: Work) -> Said:
        table = self._at_table
        state = table.consumer.state_dict()
        steps = int(state["step"]) + 1
        try:
            table.kept.save(steps, {"begun": table.begun, "consumer": state}, spare=self._restored)
        except OSError as error:
            raise ProtocolError(f"the tenant cannot keep its state: {error.strerror or error}") from error
        return {"steps": steps}, {}

    def _restore(self, work: Work) -> Said:
        table, steps = self._at_table, int(work.fields["steps"])
        table.consumer.load_state_dict(table.kept.at(steps)["consumer"])
        table.kept.forget_after(steps)
        self._restored.add(steps)
        return {}, {}

    def _end(self, work: Work) -> Said:
        table = self._table = self._table or self._table_kept(str(work.fields.get("run", "")))
        version = work.fields.get("version")
        self.outcome = Trained(
            task=self.task,
            version=str(version) if version else None,
            reason=str(work.fields.get("reason", "")),
            offer=table.offer,
            head=table.consumer.head(),
            network=table.consumer.network(),
            test=table.reports.get("test"),
        )
        return {}, {}

    def forget(self) -> None:
        """Remove the states of a training that came to its end: what it was for is published."""
        if self._table is not None and self.outcome is not None and self.outcome.version is not None:
            shutil.rmtree(self._table.kept.folder, ignore_errors=True)

    def _table_of(self, begun: Mapping[str, Any]) -> _Table:
        """A fresh head for what the producer offers. Raises `ProtocolError` where that is another task."""
        offer, proposed = read_offer(begun)
        if offer.spec.name != self.task:
            raise ProtocolError(f"the producer offers task {offer.spec.name!r}, and {self.task!r} was bought")
        config = self._choose(proposed)
        consumer = Consumer(offer, config, device=self._device, key=self._key)
        kept = self._kept(str(begun.get("run", "")))
        return _Table(begun=begun, offer=offer, config=config, consumer=consumer, kept=kept)

    def _table_kept(self, run: str) -> _Table:
        """The head as an earlier process kept it last: the producer keeps all states before it publishes."""
        newest = self._kept(run).newest()
        if newest is None:
            raise ProtocolError(f"the training is over, and {self._states} has no state of it")
        table = self._table_of(newest[1]["begun"])
        table.consumer.load_state_dict(newest[1]["consumer"])
        return table

    def _kept(self, run: str) -> Checkpoints:
        """Every training has a folder of its own: steps are counted anew, and the last ones of another are no older."""
        identity = f"{run}/{self.task}"
        folder = self._states / self.task / hashlib.sha256(identity.encode()).hexdigest()[:16]
        return Checkpoints(folder=folder, kind="remote-tenant", identity=identity, keep=_KEPT)

    @property
    def _at_table(self) -> _Table:
        if self._table is None:
            raise ProtocolError("the producer sent a work before it had made an offer")
        return self._table


@dataclass(kw_only=True, slots=True)
class _Table:
    """What a tenant has since the producer's last offer."""

    begun: Mapping[str, Any]
    """The work that brought the offer: another process makes the same of it."""
    offer: TaskOffer
    config: ConsumerConfig
    consumer: Consumer
    kept: Checkpoints
    seen: list[tuple[Array, Array]] = field(default_factory=list)
    """(ids, logits) of the parts of a subset that is being evaluated."""
    reports: dict[str, EvaluationReport] = field(default_factory=dict)


def train(link: Link, trainer: Trainer, *, keep: Callable[[Trained], None] = lambda _: None) -> Trained:
    """Do what the producer asks until it says that the training is over. One round trip a step.

    ``keep`` gets what there is at the end before the producer is told that it was heard: from then on nobody else has
    it. Raises what `Link.request` raises; called again, with the same trainer or one of a new process, it goes on.
    """
    message, stale = trainer.here, ""
    while True:
        if trainer.outcome is not None:
            keep(trainer.outcome)
            with suppress(UnreachableError):
                _sent(link, trainer.task, message, patience=_FAREWELL)
            trainer.forget()
            return trainer.outcome
        received = _sent(link, trainer.task, message)
        if received.status == STALE:
            message, stale = trainer.here, message.tag
        elif received.status == NOTHING_YET:
            message = trainer.here
        else:
            work = Work.from_bytes(received.body, max_bytes=MOST_BYTES)
            message = trainer.do(work)
            if message.tag == stale:
                raise ProtocolError(f"the producer asks for work {message.number}, and does not take its answer")
            if work.kind == "end" and message.error:
                raise ProtocolError(message.error)


def _sent(link: Link, task: str, message: Reply, *, patience: Patience | None = None) -> Received:
    """The producer's word on a message. An answer names its work ahead of its body, which may be large and in vain."""
    body, headers = message.to_bytes(), {"Content-Type": MEDIA_TYPE}
    if message.tag:
        headers["If-Match"] = message.tag
    if len(body) >= _SMALLEST_COMPRESSED:
        body, headers["Content-Encoding"] = compress(body, "zstd"), "zstd"
    known = {STALE} if message.tag else ()
    return link.request(
        "POST",
        f"/tasks/{task}/training",
        headers=headers,
        content=body,
        max_bytes=MOST_BYTES,
        known=known,
        patience=patience,
    )
