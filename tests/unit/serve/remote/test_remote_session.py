"""A session with a tenant behind HTTP ends as one with a hosted tenant does, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest
from remote_parties import OUTCOME, TASK, Flaky, Tenant, finish, open_session, trained

from orchestrator.checkpoint import weights_hash
from orchestrator.errors import CheckpointError, NonFiniteLossError, PartyLostError, ProtocolError
from orchestrator.ports import Ready
from orchestrator.wire import FeatureBatch, FeatureGradient
from serve.edge.errors import AnswerError, NotServedError, RefusedError
from serve.edge.link import Link, Patience, Received
from serve.heads import card_of, export_head
from serve.remote import app
from serve.remote import consumer as remote_consumer
from serve.remote.exchange import Exchange
from serve.remote.listener import Endpoint, Listener
from serve.remote.messages import Reply, Work
from serve.remote.trainer import train
from tasks.spec import TaskSpec


@pytest.fixture
def hosted(tiny_plan):
    """(epoch reports, outcome) of the undisturbed session with hosted tenants alone."""
    return trained(open_session(tiny_plan))


@pytest.fixture
def narrow(monkeypatch):
    """The tiny features are so small that any gradient fits anywhere; in a real training none does."""
    monkeypatch.setattr(app, "ENVELOPE_BYTES", 4096)


def check_same(found, hosted, tenant, *, reports: bool = True):
    """Weights of the modules, both heads, and every number that was reported."""
    if reports:
        assert [r.losses for r in found[0]] == [r.losses for r in hosted[0]]
        assert [r.validation for r in found[0]] == [r.validation for r in hosted[0]]
    assert weights_hash(found[1].weights) == weights_hash(hosted[1].weights)
    assert found[1].test == hosted[1].test
    tenant.join(timeout=20)
    assert tenant.error is None
    for name, value in hosted[1].heads[TASK].state.items():
        np.testing.assert_array_equal(tenant.outcome.head.state[name], value)


def test_a_remote_tenant_trains_the_very_same_modules_and_head(tiny_plan, hosted, listener, start_tenant):
    tenant = start_tenant()
    found = finish(open_session(tiny_plan, listener), listener)
    check_same(found, hosted, tenant)
    assert tenant.outcome.version == "1.1-0123456789ab"
    assert tenant.outcome.test == hosted[1].test[TASK]


def test_a_task_that_answers_with_a_map_is_trained_alike(tiny_plan, listener, start_tenant):
    """Labels, targets and metrics are of maps; the head is exported from what the tenant ends with."""
    data = tiny_plan.data
    spec = TaskSpec(name=TASK, target=TASK, shape=(1, 4, 4), head="map", loss="mse", metrics=("psnr",))
    grey = data.images.reshape(len(data.images), 4, 4, 4, 4, 3).mean(axis=(2, 4, 5)).round().astype(np.int64)
    labels = {**data.labels, TASK: {subset: grey[rows][:, None] for subset, rows in data.rows.items()}}
    drawn = dataclasses.replace(data, specs={**data.specs, TASK: spec}, labels=labels)
    plan = dataclasses.replace(tiny_plan, data=drawn)
    hosted = trained(open_session(plan))
    tenant = start_tenant()
    check_same(finish(open_session(plan, listener), listener), hosted, tenant)
    card = card_of(tenant.outcome.offer.spec, tenant.outcome.version, tenant.outcome.offer.contract.shape)
    assert card.answer_shape == (1, 4, 4)
    assert export_head(tenant.outcome.network, card)
    assert tenant.outcome.test.metrics["psnr"] > 5


def test_the_head_never_comes_to_the_producer(tiny_plan, listener, start_tenant, monkeypatch):
    """Neither published nor in a state; nothing that is sent up has as many numbers as the head."""
    sent: list[Reply] = []
    take = Exchange.take
    monkeypatch.setattr(Exchange, "take", lambda self, reply: (sent.append(reply), take(self, reply)))
    start_tenant()
    _, outcome = finish(open_session(tiny_plan, listener), listener)
    assert set(outcome.heads) == {"bright"}
    assert outcome.state["consumers"][TASK] == {"kept_after": 6}
    assert {name for reply in sent for name in reply.arrays} == {"gradient"}


def test_labels_travel_sealed_to_the_tenants_own_key(tiny_plan, listener, start_tenant):
    """A tenant with another key than the one it named cannot read them, and says so."""
    tenant = start_tenant()
    other = type(tenant.trainer._key).generate()
    begin = tenant.trainer._works["begin"]

    def lie(work):
        fields, arrays = begin(work)
        return {**fields, "key": other.public_key(TASK).raw.hex()}, arrays

    tenant.trainer._works = {**tenant.trainer._works, "begin": lie}
    with pytest.raises(ProtocolError, match="sealed to another key"):
        open_session(tiny_plan, listener).start()


def test_lost_requests_and_lost_answers_change_nothing(tiny_plan, hosted, listener, tenants, start_tenant, narrow):
    """An answer that was lost is asked for again; the step was applied once, on both sides."""
    transport = Flaky(up=5, down=3)
    link = Link(listener.url, tenants.token, transport=transport, patience=Patience(first_s=0.001, longest_s=0.001))
    tenant = start_tenant(link=link)
    check_same(finish(open_session(tiny_plan, listener), listener), hosted, tenant)
    assert transport._n > 30


def test_a_tenant_that_is_started_anew_goes_on_from_the_last_state(tiny_plan, hosted, listener, start_tenant, tmp_path):
    """Its first process stops in the second epoch; the session takes all parties back to the state of the first."""
    first = start_tenant()
    seen: list[int] = []

    def stop_at(step: int) -> Any:
        learn = first.trainer._works["learn"]

        def until(work):
            if work.fields["step"] == step:
                raise KeyboardInterrupt
            seen.append(work.fields["step"])
            return learn(work)

        return until

    first.trainer._works = {**first.trainer._works, "learn": stop_at(4)}
    stages: list[str] = []

    class Observer:
        def on_step(self, report):
            pass

        def on_epoch(self, report):
            pass

        def on_stage(self, title):
            stages.append(title)

    session = open_session(tiny_plan, listener, observers=(Observer(),))
    second: list[Any] = []

    def restart():
        first.join()
        second.append(start_tenant())

    threading.Thread(target=restart).start()
    found = finish(session, listener)
    assert isinstance(first.error, KeyboardInterrupt)
    check_same(found, hosted, second[0])
    assert len(stages) == 1
    assert "started anew" in stages[0]
    assert "going on from step 3" in stages[0]


def test_a_producer_that_is_started_anew_goes_on_from_its_checkpoint(tiny_plan, hosted, listener, start_tenant):
    """The tenant's process lives on, and goes back to the state that it kept itself."""
    tenant = start_tenant()
    saved: list[dict[str, Any]] = []
    dying = open_session(tiny_plan, listener, save=lambda _, state: saved.append(state))
    dying.start()
    dying.run_epoch()
    dying.train_step()
    found = finish(open_session(tiny_plan, listener), listener, saved[0])
    check_same(found, hosted, tenant, reports=False)
    assert found[0][-1].losses == hosted[0][-1].losses


def test_a_producer_that_is_killed_amid_a_step_gets_its_tenant_back(tiny_plan, hosted, tenants, tmp_path, narrow):
    """Another process listens at the same port; the gradient that the tenant then has is of a work it never asked."""
    computing, resumed, saved = threading.Event(), threading.Event(), []
    with Listener((TASK,), Endpoint.parse("127.0.0.1:0"), tenants.gate, patience_s=20.0) as killed:
        tenant = Tenant(killed.url, tenants.token, tmp_path / "states")
        learn = tenant.trainer._works["learn"]

        def slowly(work):
            if work.fields["step"] == 4 and not resumed.is_set():
                computing.set()
                assert resumed.wait(20)
            return learn(work)

        tenant.trainer._works = {**tenant.trainer._works, "learn": slowly}
        tenant.start()
        dying = open_session(tiny_plan, killed, save=lambda _, state: saved.append(state))
        dying.start()
        dying.run_epoch()
        dying.train_step()
        dying.consumers[TASK].learn(dying.producer.features(4)[TASK])
        assert computing.wait(20)
    endpoint = Endpoint.parse(killed.url.removeprefix("http://"))
    with Listener((TASK,), endpoint, tenants.gate, patience_s=20.0) as listener:
        resumed.set()
        found = finish(open_session(tiny_plan, listener), listener, saved[0])
    check_same(found, hosted, tenant, reports=False)
    assert found[0][-1].losses == hosted[0][-1].losses


def test_a_producer_that_dies_in_further_epochs_finds_where_they_began(tiny_plan, listener, start_tenant):
    """They are kept nowhere but in the tenant's states, of which there are more by then than it keeps otherwise."""
    tenant = start_tenant()
    _, first = trained(open_session(tiny_plan, listener))
    longer = dataclasses.replace(tiny_plan, config=dataclasses.replace(tiny_plan.config, epochs=4))
    trained(open_session(longer, listener, keep_every=1), first.state)
    found = finish(open_session(longer, listener), listener, first.state)
    _, hosted = trained(open_session(tiny_plan))
    check_same(found, trained(open_session(longer), hosted.state), tenant)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (np.ones((64, 4096), np.float32), "unpacks to"),
        (np.random.default_rng(0).standard_normal((512, 4096), np.float32), "413: the body has more than"),
    ],
    ids=["packed", "noise"],
)
def test_an_answer_that_is_too_large_ends_in_one_line(tiny_plan, listener, tenants, start_tenant, narrow, rows, told):
    transport = Flaky(up=10**9, down=10**9)
    tenant = start_tenant(link=Link(listener.url, tenants.token, transport=transport))
    learn = tenant.trainer._works["learn"]
    tenant.trainer._works = {
        **tenant.trainer._works,
        "learn": lambda work: (learn(work)[0], {"gradient": rows}),
    }
    session = open_session(tiny_plan, listener, recoveries=0)
    session.start()
    sent = transport._n
    listener.exchanges[TASK].patience_s = 0.5
    with pytest.raises(PartyLostError):
        session.train_step()
    tenant.join(timeout=20)
    assert isinstance(tenant.error, AnswerError)
    assert told in str(tenant.error)
    assert transport._n <= sent + 2


def test_a_producer_that_asks_for_what_it_does_not_take_is_not_answered_for_ever(start_tenant):
    """It says of every answer that it is stale, and asks for the same work again."""
    asked = Work(sitting="", number=0, kind="keep").to_bytes("fp32")
    tags: list[str] = []

    class Stubborn:
        def request(self, *_: Any, headers: dict[str, str], **__: Any) -> Received:
            tags.append(headers.get("If-Match", ""))
            return Received(412, {}, b"") if tags[-1] else Received(200, {}, asked)

    with pytest.raises(ProtocolError, match="asks for work 0, and does not take its answer"):
        train(Stubborn(), start_tenant().trainer)
    assert tags == ["", '"-0"', ""]


def test_a_tenant_without_its_states_is_told_apart(tiny_plan, listener, start_tenant, tmp_path):
    tenant = start_tenant()
    session = open_session(tiny_plan, listener)
    session.start()
    session.train_step()
    for path in (tmp_path / "states").rglob("step-*"):
        path.unlink()
    with pytest.raises(ProtocolError, match="there is no state after step 3"):
        session.load_state_dict(
            {**session.state_dict(), "consumers": {"bright": {}, TASK: {"kept_after": 3}}}
            | {"consumers": {**{"bright": session.consumers["bright"].state_dict().result()}, TASK: {"kept_after": 3}}}
        )
    assert tenant.error is None


def dies(_):
    """In place of a work: the process ends when it is asked for that."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before it is told", "while it is told"])
def test_a_tenant_that_dies_when_all_is_published_gets_its_head_back(
    tiny_plan, hosted, listener, start_tenant, tmp_path, when
):
    """Its next process is told as well, and makes the head of the last state that the first one kept."""
    first, kept = start_tenant(), []
    first.trainer._works = {**first.trainer._works, "end": dies}
    found = trained(open_session(tiny_plan, listener))
    if when == "before it is told":
        listener.tell({TASK: OUTCOME}, run="a", wait_s=0.0)  # it dies, and nobody waits
        first.join(timeout=20)
    waiting = threading.Thread(target=lambda: kept.append(listener.tell({TASK: OUTCOME}, run="a", wait_s=20.0)))
    waiting.start()
    first.join(timeout=20)
    assert isinstance(first.error, KeyboardInterrupt)
    second = start_tenant()
    check_same(found, hosted, second)
    waiting.join(timeout=20)
    assert kept == [[]]
    assert second.outcome.version == OUTCOME["version"]
    assert not list((tmp_path / "states").rglob("step-*"))


def test_a_producer_that_dies_before_it_tells_tells_when_it_is_resumed(tiny_plan, hosted, tenants, tmp_path):
    """Another process listens at the same port, and knows nothing but what was published."""
    with Listener((TASK,), Endpoint.parse("127.0.0.1:0"), tenants.gate, patience_s=20.0) as killed:
        tenant = Tenant(killed.url, tenants.token, tmp_path / "states")
        tenant.start()
        found = trained(open_session(tiny_plan, killed))
    with Listener((TASK,), Endpoint.parse(killed.url.removeprefix("http://")), tenants.gate, patience_s=20.0) as later:
        assert later.tell({TASK: OUTCOME}, run="a") == []
    check_same(found, hosted, tenant)


def test_the_head_is_kept_before_the_producer_hears_that_it_is(tiny_plan, listener, start_tenant, monkeypatch):
    """From then on nobody else could give it back; a disk that is full leaves the producer waiting.

    The next process is at it already when the producer tells once more: it is heard for that, too.
    """
    full, said = OSError(28, "No space left on device"), []
    at_it, again, end = threading.Event(), threading.Event(), Exchange.end

    def telling(self, *arguments):
        asked = end(self, *arguments)
        if said:
            again.set()
        return asked

    def keep(trained):
        said.append(trained.version)
        if len(said) == 1:
            raise full
        at_it.set()
        assert again.wait(20)

    monkeypatch.setattr(Exchange, "end", telling)

    first = start_tenant(keep=keep)
    trained(open_session(tiny_plan, listener))
    assert listener.tell({TASK: OUTCOME}, run="a", wait_s=0.5) == [TASK]
    first.join(timeout=20)
    assert first.error is full
    start_tenant(keep=keep)
    assert at_it.wait(20)
    assert listener.tell({TASK: OUTCOME}, run="a") == []
    assert said == [OUTCOME["version"]] * 2


def test_the_end_of_a_training_that_left_no_state_is_an_error_and_not_waited_for(listener, start_tenant):
    tenant = start_tenant()
    assert listener.tell({TASK: OUTCOME}, run="never", wait_s=2.0) == [TASK]
    tenant.join(timeout=20)
    assert isinstance(tenant.error, ProtocolError)
    assert "has no state of it" in str(tenant.error)


def test_a_training_in_a_folder_with_the_states_of_another_keeps_its_own(tiny_plan, hosted, listener, start_tenant):
    """Those of the first one have higher numbers than the first of the second, and are not taken for newer."""
    longer = dataclasses.replace(tiny_plan, config=dataclasses.replace(tiny_plan.config, epochs=6))
    start_tenant()
    session = open_session(longer, listener)
    session.start()
    session.run()
    second = open_session(tiny_plan, listener, run="b")
    second.start()
    state = second.state_dict()
    second.run_epoch()
    second.load_state_dict(state)
    assert [report.losses for report in second.run()] == [report.losses for report in hosted[0]]


def test_states_of_steps_that_are_done_again_are_not_taken_for_the_last(tiny_plan, listener, start_tenant, tmp_path):
    tenant = start_tenant()
    session = open_session(tiny_plan, listener)
    session.start()
    begun = session.state_dict()
    session.run()
    steps = lambda: sorted(int(path.name[5:]) for path in (tmp_path / "states").rglob("step-*"))  # noqa: E731
    assert steps()[-1] == tiny_plan.total_steps
    session.load_state_dict(begun)
    assert steps() == [0]
    assert tenant.error is None


def test_a_state_with_a_hosted_head_is_no_remote_tenants(tiny_plan, listener):
    consumer = open_session(tiny_plan, listener).consumers[TASK]
    with pytest.raises(CheckpointError, match="resume without --remote"):
        consumer.load_state_dict({"head": {}, "step": 3})


def test_a_second_process_takes_over_and_the_first_is_told(tiny_plan, listener, start_tenant):
    first = start_tenant()
    session = open_session(tiny_plan, listener)
    session.start()
    second = start_tenant()
    session.run()
    first.join(timeout=20)
    assert isinstance(first.error, AnswerError)
    assert "not needed any more" in str(first.error)
    listener.tell({TASK: {"version": None, "reason": "enough"}})
    second.join(timeout=20)
    assert second.outcome.reason == "enough"


def test_a_tenant_that_stays_away_is_lost_and_not_waited_for_for_ever(tiny_plan, listener):
    listener.exchanges[TASK].patience_s = 0.3
    with pytest.raises(PartyLostError, match=f"tenant of task '{TASK}' was not heard of"):
        open_session(tiny_plan, listener, recoveries=1).start()


@pytest.mark.parametrize(("precision", "off"), [("fp16", 5e-3), ("int8", 2e-1)])
def test_a_narrow_wire_costs_little(tiny_plan, hosted, listener, start_tenant, precision, off):
    start_tenant(precision=precision)
    reports, _ = finish(open_session(tiny_plan, listener), listener)
    assert reports[0].losses[TASK] == pytest.approx(hosted[0][0].losses[TASK], rel=off)
    assert reports[-1].losses[TASK] < 0.5 * reports[0].losses[TASK]


def test_half_precision_keeps_gradients_that_are_too_small_for_it(tiny_plan, monkeypatch):
    """Of a mean over a large batch they are below 6e-8, the smallest that float16 has."""
    from serve.remote.messages import Work, gradient_reply, read_gradient

    contract = open_session(tiny_plan).producer.offers()[TASK].contract
    rng = np.random.default_rng(0)
    rows = (1e-9 * rng.standard_normal((4, *contract.shape))).astype(np.float32)
    gradient = FeatureGradient(contract=contract, step=0, gradient=rows, loss=0.5)
    fields, arrays = gradient_reply(gradient, "fp16")
    body = Reply(process="p", precision="fp16", fields=fields, arrays=arrays).to_bytes()
    assert len(body) < rows.nbytes
    found = read_gradient(contract, Reply.from_bytes(body, max_bytes=len(body), max_values=rows.size))
    np.testing.assert_allclose(found.gradient, rows, rtol=1e-3, atol=1e-3 * np.abs(rows).max())
    assert Work(sitting="s", number=0, kind="learn", arrays={"features": rows}).answer_values == rows.size


def test_a_remote_tenant_that_sends_no_gradient_of_its_task_is_in_quarantine(tiny_plan, listener, start_tenant):
    """The guard judges what comes over HTTP as it judges what comes from an actor."""
    plan = dataclasses.replace(tiny_plan, config=dataclasses.replace(tiny_plan.config, epochs=20))
    tenant = start_tenant()
    learn = tenant.trainer._works["learn"]

    def blind(work):
        fields, arrays = learn(work)
        return fields, {"gradient": np.ones_like(arrays["gradient"])}

    tenant.trainer._works = {**tenant.trainer._works, "learn": blind}
    session = open_session(plan, listener)
    session.start()
    session.run()
    assert "do not follow its labels" in session.quarantined[TASK]
    assert set(session.finish().test) == {"bright"}


def test_a_tenant_that_diverges_is_known_to_have_done_so(tiny_plan, listener, start_tenant):
    tenant = start_tenant()
    plan = dataclasses.replace(tiny_plan, data=tiny_training_data_of(TASK))
    session = open_session(plan, listener)
    session.start()
    tenant.trainer._table.consumer._loss = lambda logits, targets: logits.sum() * float("nan")
    with pytest.raises(NonFiniteLossError, match=f"the loss of task '{TASK}' is nan at step 0"):
        session.train_step()


def tiny_training_data_of(task: str):
    from tiny import tiny_training_data

    return tiny_training_data((task,))


def test_a_subset_is_evaluated_in_parts(tiny_plan, listener, start_tenant, monkeypatch):
    """The metrics are those of the whole, whatever the size of the parts."""
    start_tenant()
    session = open_session(tiny_plan, listener)
    session.start()
    whole = session.evaluate("test")
    monkeypatch.setattr(remote_consumer, "PART_BYTES", 1)
    assert session.evaluate("test") == whole


def test_a_wrong_gradient_shape_ends_in_quarantine_and_not_in_a_crash(tiny_plan, listener, start_tenant):
    tenant = start_tenant()
    learn = tenant.trainer._works["learn"]
    tenant.trainer._works = {
        **tenant.trainer._works,
        "learn": lambda work: (learn(work)[0], {"gradient": np.zeros((1, 2), np.float32)}),
    }
    session = open_session(tiny_plan, listener)
    session.start()
    session.train_step()
    assert "must have shape" in session.quarantined[TASK]


@pytest.mark.parametrize("authorization", [None, "Bearer mm_0000000000000000_" + 43 * "A", "Basic abc"])
def test_nobody_trains_without_a_token(listener, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = httpx.post(f"{listener.url}/tasks/{TASK}/training", headers=headers, content=b"")
    check_problem(answer, 401, "no valid token was given")


def test_a_task_that_was_not_granted_and_one_that_is_not_trained_answer_alike(listener, tenants, tmp_path):
    tenants.registry.grant("acme", "other")
    answers = [
        httpx.post(f"{listener.url}/tasks/{task}/training", headers={"Authorization": f"Bearer {tenants.token}"})
        for task in ("other", "unknown", "bright")
    ]
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.text for answer in answers}) == 1


def test_a_token_that_is_revoked_meanwhile_is_refused_from_the_next_step_on(tiny_plan, listener, tenants, start_tenant):
    tenant = start_tenant()
    listener.exchanges[TASK].patience_s = 0.5
    session = open_session(tiny_plan, listener, recoveries=0)
    session.start()
    session.train_step()
    tenants.registry.revoke("acme")
    with pytest.raises(PartyLostError):
        session.run()
    tenant.join(timeout=20)
    assert isinstance(tenant.error, (RefusedError, NotServedError))


def test_a_step_is_no_request_of_the_minutes_quota(tiny_plan, listener, tenants, start_tenant):
    tenants.registry.set_rate("acme", 2)
    tenant = start_tenant()
    finish(open_session(tiny_plan, listener), listener)
    tenant.join(timeout=20)
    assert tenant.error is None


def check_problem(answer: httpx.Response, status: int, title: str) -> None:
    """In the form that all of serving has (RFC 9457)."""
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    found = answer.json()
    assert (found["status"], found["title"]) == (status, title)


@pytest.mark.parametrize("size_bytes", [1 << 20, 64 << 20])
def test_a_body_larger_than_the_answer_is_refused_and_its_sender_sees_it(listener, tenants, size_bytes):
    """However large: a connection that is cut amid a body looks like one that failed, and is tried again."""
    answer = httpx.post(
        f"{listener.url}/tasks/{TASK}/training",
        headers={"Authorization": f"Bearer {tenants.token}"},
        content=bytes(size_bytes),
    )
    check_problem(answer, 413, "the body has more than 65,536 bytes")


def test_an_answer_that_nobody_waits_for_is_passed_over_however_large(listener, tenants):
    headers = {"Authorization": f"Bearer {tenants.token}", "If-Match": '"0123456789abcdef-7"'}
    answer = httpx.post(f"{listener.url}/tasks/{TASK}/training", headers=headers, content=bytes(64 << 20))
    check_problem(answer, 412, "that work of task 'left' is not asked for: say that you are there")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"/tasks/{TASK}/training"),
        ("POST", f"/tasks/{TASK}/training/"),
        *(("GET", path) for path in ("/", "/openapi.json", "/docs", "/healthz", "/tasks/left", "/tasks/x/training")),
    ],
)
def test_the_gate_is_asked_before_anything_is_told(listener, tenants, method, path):
    """Nobody learns from the outside what is here; a tenant learns no more than that there is nothing."""
    nobody = httpx.request(method, listener.url + path)
    check_problem(nobody, 401, "no valid token was given")
    assert nobody.headers["www-authenticate"] == "Bearer"
    known = httpx.request(method, listener.url + path, headers={"Authorization": f"Bearer {tenants.token}"})
    if path == f"/tasks/{TASK}/training":
        check_problem(known, 405, "there is no such method here")
    else:
        check_problem(known, 404, "there is no such task for this token")


def test_a_tenant_that_asks_too_often_is_told_when_to_come_again(listener, tenants):
    tenants.registry.set_rate("acme", 1)
    headers = {"Authorization": f"Bearer {tenants.token}"}
    assert httpx.get(listener.url, headers=headers).status_code == 404
    answer = httpx.get(listener.url, headers=headers)
    check_problem(answer, 429, "too many requests")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_second_process_is_told_that_another_took_over_as_a_problem(listener, tenants):
    def come(process: str) -> httpx.Response:
        return httpx.post(
            f"{listener.url}/tasks/{TASK}/training",
            headers={"Authorization": f"Bearer {tenants.token}"},
            content=Reply(process=process).to_bytes(),
        )

    listener.exchanges[TASK].over = True  # nobody is kept waiting
    assert [come(process).status_code for process in ("a", "b")] == [204, 204]
    title = "another process of the same tenant trains task 'left' now; this one is not needed any more"
    check_problem(come("a"), 409, title)


def test_what_nobody_foresaw_is_a_bare_problem_and_is_logged(listener, tenants, monkeypatch, caplog):
    def fail(*_: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(Exchange, "take", fail)
    headers = {"Authorization": f"Bearer {tenants.token}"}
    url = f"{listener.url}/tasks/{TASK}/training"
    answer = httpx.post(url, headers=headers, content=Reply(process="p").to_bytes())
    check_problem(answer, 500, "the server failed")
    assert "secret" not in answer.text
    assert "secret" in caplog.text


def test_a_tenant_that_leaves_amid_a_body_leaves_no_traceback(listener, tenants, caplog, capfd):
    """Its next process is served as if nothing had been."""
    host, port = listener.url.removeprefix("http://").split(":")
    head = f"POST /tasks/{TASK}/training HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {tenants.token}\r\n"
    for tag in ("", 'If-Match: "0-1"\r\n'):
        with socket.create_connection((host, int(port))) as leaving:
            leaving.sendall(f"{head}{tag}Content-Length: 1000\r\n\r\n".encode() + bytes(10))
            time.sleep(0.2)
    time.sleep(0.3)
    listener.exchanges[TASK].over = True
    answer = httpx.post(
        f"{listener.url}/tasks/{TASK}/training",
        headers={"Authorization": f"Bearer {tenants.token}"},
        content=Reply(process="p").to_bytes(),
    )
    assert answer.status_code == 204
    assert caplog.records == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("body", [b"", b"\x80\x04N.", bytes(200), b'{"protocol": 1}', b"\xff" * 64])
def test_what_is_no_message_is_refused_and_training_goes_on(tiny_plan, hosted, listener, tenants, start_tenant, body):
    answer = httpx.post(
        f"{listener.url}/tasks/{TASK}/training", headers={"Authorization": f"Bearer {tenants.token}"}, content=body
    )
    check_problem(answer, 400, "the message is not right")
    tenant = start_tenant()
    check_same(finish(open_session(tiny_plan, listener), listener), hosted, tenant)


def test_the_consumer_refuses_what_a_hosted_one_refuses(tiny_plan, listener, start_tenant):
    """A step out of order, from whoever sits in between."""
    start_tenant()
    session = open_session(tiny_plan, listener)
    session.start()
    batch: FeatureBatch = session.producer.features(0)[TASK].result()
    with pytest.raises(ProtocolError, match="it was sent step 5"):
        session.consumers[TASK].learn(Ready(dataclasses.replace(batch, step=5))).result()
