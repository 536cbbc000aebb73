"""What a remote training tells through bounded features is in the ledger of bits before it is told."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from remote_parties import TASK, Flaky, Tenants, finish, open_session, trained

from orchestrator.checkpoint import weights_hash
from orchestrator.errors import ProtocolError
from orchestrator.privacy.bounded.bit_ledger import BitLedger
from serve.edge.errors import RefusedError
from serve.edge.link import Link, Patience
from serve.remote.trainer import Trainer

ANY = float("inf")


@pytest.fixture
def ledger(tenants: Tenants) -> Iterator[BitLedger]:
    with BitLedger(tenants.gate.places.bits) as ledger:
        yield ledger


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(kind, features) of every work that comes to a tenant, the repeated ones too."""
    came: list[tuple[str, int]] = []
    do = Trainer.do

    def noting(self: Trainer, work: Any) -> Any:
        if "features" in work.arrays:
            came.append((work.kind, len(work.arrays["features"])))
        return do(self, work)

    monkeypatch.setattr(Trainer, "do", noting)
    return came


def whole(plan) -> int:
    """Features of an undisturbed training: all steps, the validation subset once an epoch, the test subset."""
    rows = {subset: len(r) for subset, r in plan.data.rows.items()}
    return plan.config.epochs * (rows["train"] + rows["validation"]) + rows["test"]


def releases(ledger: BitLedger) -> int:
    return sum(part.releases for part in ledger.account("acme", TASK).spending)


def test_every_feature_of_a_training_is_charged(bounded_plan, listener, start_tenant, ledger, seen):
    """As often as noise was drawn for it; the last look at the validation subset is the epoch's once more."""
    ledger.set_limit("acme", TASK, ANY)
    start_tenant()
    _, outcome = finish(open_session(bounded_plan, listener), listener)
    (spent,) = ledger.account("acme", TASK).spending
    assert spent.version == "training a"
    assert spent.bits_per_release == bounded_plan.channel.bits_per_image
    assert spent.releases == whole(bounded_plan) == bounded_plan.n_features
    again = len(bounded_plan.data.rows["validation"])
    assert sum(n for _, n in seen) == whole(bounded_plan) + again
    _, hosted = trained(open_session(bounded_plan))
    assert weights_hash(outcome.weights) == weights_hash(hosted.weights)


def test_what_nothing_bounds_is_not_counted(tiny_plan, listener, start_tenant, ledger):
    start_tenant()
    finish(open_session(tiny_plan, listener), listener)
    assert ledger.summary() == []


def test_what_is_sent_or_done_again_is_charged_once(bounded_plan, listener, tenants, start_tenant, ledger, seen):
    """Answers are lost on the way, the tenant's process dies once, and so does the producer's."""
    ledger.set_limit("acme", TASK, whole(bounded_plan) * bounded_plan.channel.bits_per_image)
    link = Link(
        listener.url,
        tenants.token,
        transport=Flaky(up=5, down=3),
        patience=Patience(first_s=0.001, longest_s=0.001),
    )
    first = start_tenant(link=link)
    learn = first.trainer._works["learn"]

    def until(work):
        if work.fields["step"] == 4:
            raise KeyboardInterrupt
        return learn(work)

    first.trainer._works = {**first.trainer._works, "learn": until}
    threading.Thread(target=lambda: (first.join(), start_tenant())).start()
    saved: list[dict[str, Any]] = []
    dying = open_session(bounded_plan, listener, save=lambda _, state: saved.append(state))
    dying.start()
    dying.run()
    assert isinstance(first.error, KeyboardInterrupt)
    finish(open_session(bounded_plan, listener), listener, saved[0])
    assert sum(n for _, n in seen) > whole(bounded_plan) + len(bounded_plan.data.rows["train"])
    assert releases(ledger) == whole(bounded_plan)


def test_another_training_is_charged_anew(bounded_plan, listener, start_tenant, ledger):
    """Its noise is another."""
    ledger.set_limit("acme", TASK, ANY)
    for n, run in enumerate(("a", "b"), start=1):
        start_tenant()
        finish(open_session(bounded_plan, listener, run=run), listener)
        assert releases(ledger) == n * whole(bounded_plan)


@pytest.mark.parametrize("limit", [None, "one feature too few"])
def test_a_training_for_which_there_is_no_room_sends_nothing(
    bounded_plan, listener, start_tenant, ledger, seen, tenants, limit
):
    """Not even its beginning, which would be of no use to anybody."""
    bits = bounded_plan.channel.bits_per_image
    if limit is not None:
        ledger.set_limit("acme", TASK, (whole(bounded_plan) - 1) * bits)
    tenant = start_tenant()
    told = "has no limit of bits" if limit is None else f"asked for {whole(bounded_plan) * bits:g} bits"
    with pytest.raises(ProtocolError, match=told):
        open_session(bounded_plan, listener).start()
    tenant.join(timeout=20)
    assert isinstance(tenant.error, RefusedError)
    assert "gives this tenant no more (403: the quota of this task is used up)" in str(tenant.error)
    assert "bits" not in str(tenant.error)
    assert seen == []
    assert releases(ledger) == 0


def test_a_limit_that_is_lowered_meanwhile_ends_the_training_of_that_task(
    bounded_plan, listener, start_tenant, ledger, seen
):
    """Nothing is told that is not charged, and the other tasks go on."""
    ledger.set_limit("acme", TASK, ANY)
    tenant = start_tenant()
    session = open_session(bounded_plan, listener)
    session.start()
    session.run_epoch()
    spent = releases(ledger)
    ledger.set_limit("acme", TASK, (spent + 1) * bounded_plan.channel.bits_per_image)
    session.run()
    assert "no more of the training is sent" in session.quarantined[TASK]
    assert set(session.finish().test) == {"bright"}
    tenant.join(timeout=20)
    assert isinstance(tenant.error, RefusedError)
    assert releases(ledger) == spent == sum(n for _, n in seen)


def test_a_subset_in_parts_that_does_not_fit_is_not_waited_for(
    bounded_plan, listener, start_tenant, ledger, monkeypatch
):
    """The tenant is gone after the first part, and the session hears so at the last."""
    monkeypatch.setattr("serve.remote.consumer.PART_BYTES", 1)
    ledger.set_limit("acme", TASK, ANY)
    start_tenant()
    session = open_session(bounded_plan, listener)
    session.start()
    ledger.set_limit("acme", TASK, 0.0)
    with pytest.raises(ProtocolError, match="no more of the training is sent"):
        session.evaluate("test")


def test_the_offer_says_what_a_training_tells(bounded_plan, tiny_plan):
    offer = open_session(bounded_plan).producer.offers()[TASK]
    assert offer.bits_per_feature == bounded_plan.channel.bits_per_image
    assert offer.n_features == whole(bounded_plan)
    longer = dataclasses.replace(bounded_plan, config=dataclasses.replace(bounded_plan.config, epochs=5))
    assert open_session(longer).producer.offers()[TASK].n_features == whole(longer)
    assert open_session(tiny_plan).producer.offers()[TASK].bits_per_feature is None


def test_digests_differ_wherever_noise_or_weights_do(bounded_plan, listener, ledger):
    """By training, step, subset, place and feature; those of an evaluation by the steps that were done before."""
    found = set()
    n = 0
    for run in ("a", "b"):
        consumer = open_session(bounded_plan, listener, run=run).consumers[TASK]
        for steps in (1, 2):
            consumer._steps_done = steps
            for what in ("learn", "validation", "test"):
                for value in (0.0, 0.25):
                    features = np.full((16, 4, 1, 1), value, np.float32)
                    digests = consumer._releases(what, features).digests
                    found |= set(digests)
                    n += len(digests)
    assert len(found) == n
