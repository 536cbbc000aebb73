"""The guard at the producer: honest consumers pass, others are stopped, and nobody else notices."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from tiny import tiny_training_data

from orchestrator.checkpoint import weights_hash
from orchestrator.errors import ConfigError, NonFiniteLossError, ProtocolError, QuarantineError
from orchestrator.guard import GradientGuard, GuardConfig, label_use
from orchestrator.local import LocalConsumer, LocalProducer
from orchestrator.ports import Ready
from orchestrator.session import Session
from orchestrator.wire import FeatureContract, FeatureGradient

CONTRACT = FeatureContract(task="left", shape=(3, 2, 2))


def message(gradient, step=0, loss=0.5) -> FeatureGradient:
    return FeatureGradient(contract=CONTRACT, step=step, gradient=gradient, loss=loss)


def honest_gradient(labels, step=0, scale=1.0):
    """As of a linear head: along one direction, to and fro by the label."""
    rng = np.random.default_rng(step)
    direction = np.random.default_rng(99).normal(size=(1, 3, 2, 2))
    doubt = rng.uniform(0.1, 1.0, size=(len(labels), 1, 1, 1))
    sign = np.where(labels == 1, -1.0, 1.0).reshape(-1, 1, 1, 1)
    return (scale / max(1, len(labels)) * sign * doubt * direction).astype(np.float32)


def blind_gradient(labels, step=0):
    """Whatever direction: labels play no part."""
    return (np.random.default_rng(step).normal(size=(len(labels), 3, 2, 2)) / max(1, len(labels))).astype(np.float32)


def common_gradient(labels, step=0):
    """All are pulled one way, and a little by what is in the image, which goes with the label: perfect agreement."""
    pull = np.random.default_rng(98).normal(size=(1, 3, 2, 2))
    return (pull / len(labels) + 0.3 * honest_gradient(labels, step)).astype(np.float32)


def norms(rows):
    return np.linalg.norm(rows.astype(np.float64), axis=1)


def labels_of(step, n=64):
    return np.random.default_rng(1000 + step).integers(0, 2, n)


def ask(guard, step, gradient, labels, **changed) -> bool:
    return guard.accepts(message(gradient, step, **changed), contract=CONTRACT, step=step, labels=labels)


def test_of_a_map_only_shape_and_norm_are_looked_at():
    """No two maps are the same label, so there is nothing for the gradients to agree with."""
    guard = GradientGuard(GuardConfig())
    maps = np.random.default_rng(0).integers(0, 256, (64, 1, 4, 4))
    assert all(ask(guard, step, blind_gradient(maps, step), maps) for step in range(12))
    assert not ask(guard, 12, 1e6 * blind_gradient(maps, 12), maps)
    assert "has norm" in guard.quarantined["left"]
    blind = GradientGuard(GuardConfig())
    assert not all(ask(blind, step, blind_gradient(labels_of(step), step), labels_of(step)) for step in range(12))


# -- one gradient at a time ----------------------------------------------------------------------------------------


def test_agreement_is_1_for_a_linear_head_a_half_for_the_blind_and_less_for_the_contrary():
    labels = labels_of(0)
    for gradient, low, high in (
        (honest_gradient(labels), 1.0, 1.0),
        (blind_gradient(labels), 0.45, 0.55),
        (np.ones((64, 12), np.float32), 0.5, 0.5),
    ):
        rows = gradient.reshape(64, -1)
        assert low <= label_use(rows, norms(rows), labels).agreement <= high
    rows = np.eye(2, dtype=np.float32)[[0, 1, 0, 1]]
    assert label_use(rows, np.ones(4), np.array([0, 0, 1, 1])).agreement == 0.25


def test_agreement_counts_pairs_as_a_loop_over_them_does():
    rng = np.random.default_rng(3)
    rows, labels = rng.integers(-1, 2, (14, 2)).astype(np.float32) + 0.25, rng.integers(0, 3, 14)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [(round(float(units[i] @ units[j]), 5), labels[i] == labels[j]) for i in range(14) for j in range(i)]
    same, apart = [c for c, s in pairs if s], [c for c, s in pairs if not s]
    expected = np.mean([(a > b) + 0.5 * (a == b) for a in same for b in apart])
    use = label_use(rows, norms(rows), labels)
    assert use.agreement == pytest.approx(expected, abs=1e-9)
    assert use.same == pytest.approx(np.mean(same), abs=1e-4)
    assert use.different == pytest.approx(np.mean(apart), abs=1e-4)


def label_use_in_float64(rows, labels):
    """Pair by pair, with nothing saved on."""
    exact = rows.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    some = lengths > 1e-3 * np.median(lengths)
    units, labels = exact[some] / lengths[some][:, None], labels[some]
    first, second = np.triu_indices(len(units), k=1)
    cosines = (units @ units.T)[first, second]
    one = labels[first] == labels[second]
    same, apart = cosines[one], cosines[~one]
    above = (same[:, None] > apart).mean() + 0.5 * (same[:, None] == apart).mean()
    return above, same.mean(), apart.mean()


@pytest.mark.parametrize("scale", [1e-34, 1e-20, 1e-6, 1.0, 1e18, 1e36])
@pytest.mark.parametrize(
    ("n", "powers", "gradient"), [(64, -3, honest_gradient), (128, 1, blind_gradient), (40, 6, common_gradient)]
)
def test_norms_and_cosines_are_those_of_float64_at_every_scale(scale, n, powers, gradient):
    """Rows differ by up to so many powers of ten, and some are zero."""
    rng = np.random.default_rng(n)
    labels = rng.integers(0, 3, n)
    rows = gradient(labels).reshape(n, -1).astype(np.float64) + rng.normal(0, 0.2 / n, (n, 12))
    rows *= scale * 10.0 ** (powers * rng.random((n, 1)))
    rows[rng.random(n) < 0.1] = 0
    rows = np.clip(rows, -3e38, 3e38).astype(np.float32)
    guard = GradientGuard(GuardConfig(first_norm=1e100, evidence=10**9))
    assert ask(guard, 0, rows.reshape(n, 3, 2, 2), labels)
    record = guard._records["left"]
    assert record.first == pytest.approx([np.log10(n * norms(rows).max())], abs=1e-12)
    ((*use, examples),) = record.labels
    assert use == pytest.approx(label_use_in_float64(rows, labels), abs=2e-5)
    assert examples == n


def test_a_long_gradient_is_added_up_as_exactly_as_a_short_one():
    """As many numbers as the largest feature has, and all of one sign: the worst that float32 can be given."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 32)
    rows = ((1 + labels[:, None]) * rng.random((32, 64 * 16 * 16)) ** (1 + labels[:, None])).astype(np.float32)
    assert label_use(rows, norms(rows), labels) == pytest.approx(label_use_in_float64(rows, labels), abs=2e-5)


def test_a_gradient_of_the_smallest_numbers_says_nothing():
    labels = labels_of(0)
    rows = (1e-42 * blind_gradient(labels) / np.abs(blind_gradient(labels)).max()).reshape(64, -1).astype(np.float32)
    assert rows.any()
    assert label_use(rows, norms(rows), labels) is None
    assert ask(GradientGuard(GuardConfig(evidence=1)), 0, rows.reshape(64, 3, 2, 2), labels)


@pytest.mark.parametrize(
    "labels",
    [np.zeros(0, int), np.array([1]), np.array([0, 1]), np.zeros(8, int), np.arange(8)],
    ids=["empty", "one", "two", "one label", "a label each"],
)
def test_a_batch_that_says_nothing_about_labels_is_accepted(labels):
    guard = GradientGuard(GuardConfig(evidence=1))
    assert ask(guard, 0, blind_gradient(labels), labels)
    assert ask(guard, 1, np.zeros((len(labels), 3, 2, 2), np.float32), labels)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"gradient": np.zeros((64, 3, 2, 1), np.float32)}, "shape"),
        ({"gradient": np.zeros((63, 3, 2, 2), np.float32)}, "shape"),
        ({"gradient": np.zeros((64, 3, 2, 2), np.float64)}, "float32"),
        ({"gradient": [[0.0]]}, "float32"),
        ({"gradient": np.full((64, 3, 2, 2), np.nan, np.float32)}, "NaN or infinity"),
        ({"gradient": np.full((64, 3, 2, 2), np.inf, np.float32)}, "NaN or infinity"),
        ({"loss": float("nan")}, "no finite number"),
        ({"loss": None}, "no finite number"),
        ({"step": 3}, "step 3"),
        ({"gradient": np.full((64, 3, 2, 2), 1e30, np.float32)}, "norm"),
    ],
)
def test_a_broken_message_puts_its_task_into_quarantine_for_good(changed, reason):
    guard = GradientGuard(GuardConfig())
    labels = labels_of(0)
    sound = message(honest_gradient(labels))
    broken = dataclasses.replace(sound, **changed)
    assert not guard.accepts(broken, contract=CONTRACT, step=0, labels=labels)
    assert reason in guard.quarantined["left"]
    assert not guard.accepts(sound, contract=CONTRACT, step=0, labels=labels)


def test_a_norm_far_above_the_tasks_own_trips_after_the_warm_up_and_a_hard_example_does_not():
    """An example that a trained head gets wrong has the norm that all of them had at the beginning."""
    guard = GradientGuard(GuardConfig())
    for step in range(80):
        labels = labels_of(step)
        assert ask(guard, step, honest_gradient(labels, step, scale=10.0 ** -(step / 12)), labels)
    hard = honest_gradient(labels, 80, scale=1e-6)
    hard[0] *= 1e6
    assert ask(guard, 80, hard, labels)
    hard[0] *= 1e5
    assert not ask(guard, 81, hard, labels)
    assert "norm" in guard.quarantined["left"]


def test_the_norm_does_not_depend_on_the_batch_size():
    """What is sent is the gradient of a mean: a short last batch has larger rows."""
    guard = GradientGuard(GuardConfig(least_deviation=0.05))
    for step in range(40):
        labels = labels_of(step, 1024 if step % 5 else 3)
        assert ask(guard, step, honest_gradient(labels, step), labels)


@pytest.mark.parametrize("gradient", [blind_gradient, common_gradient])
@pytest.mark.parametrize("n", [4, 16, 64, 300])
def test_who_does_not_use_the_labels_is_stopped_once_there_is_evidence(n, gradient):
    config = GuardConfig()
    guard = GradientGuard(config)
    step = 0
    while "left" not in guard.quarantined:
        assert step < 200
        labels = labels_of(step, n)
        ask(guard, step, gradient(labels, step), labels)
        step += 1
    assert "do not follow its labels" in guard.quarantined["left"]
    assert step * n >= config.evidence


def test_who_stops_using_the_labels_later_is_stopped_too():
    guard = GradientGuard(GuardConfig())
    for step in range(300):
        labels = labels_of(step)
        assert ask(guard, step, honest_gradient(labels, step), labels)
    for step in range(300, 400):
        labels = labels_of(step)
        if not ask(guard, step, blind_gradient(labels, step), labels):
            break
    assert step - 300 < GuardConfig().window


@pytest.mark.parametrize("flips", [0.0, 0.2])
def test_a_tenth_of_wrong_labels_or_two_does_not_trip(flips):
    """The consumer's labels are the producer's; a head that has learnt otherwise still pulls by them."""
    guard = GradientGuard(GuardConfig())
    for step in range(100):
        labels = labels_of(step)
        wrong = np.random.default_rng(step).random(64) < flips / 2
        assert ask(guard, step, honest_gradient(np.where(wrong, 1 - labels, labels), step), labels)


def test_a_guard_goes_on_from_its_state_as_if_it_had_not_stopped():
    def judged(guard, steps):
        for step in steps:
            labels = labels_of(step, 32)
            gradient = honest_gradient if step < 40 else blind_gradient
            ask(guard, step, gradient(labels, step), labels)
            if guard.quarantined:
                return step
        return None

    config = GuardConfig(window=30)
    whole = GradientGuard(config)
    tripped = judged(whole, range(400))
    assert tripped is not None and tripped > 45
    half = GradientGuard(config)
    judged(half, range(tripped - 3))
    resumed = GradientGuard(config)
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert judged(resumed, range(tripped - 3, 400)) == tripped
    assert resumed.quarantined == whole.quarantined
    again = GradientGuard(config)
    again.load_state_dict(whole.state_dict())
    assert again.quarantined == whole.quarantined


@pytest.mark.parametrize(
    "changed", [{"warmup": 0}, {"window": 0}, {"agreement": 1.1}, {"compared": 2}, {"first_norm": 0.0}]
)
def test_a_config_without_meaning_is_refused(changed):
    with pytest.raises(ConfigError):
        GuardConfig(**changed)


# -- a whole session ---------------------------------------------------------------------------------------------


class Faulty(LocalConsumer):
    """An honest consumer, until its answer to one step is changed."""

    at = 0
    change = None

    def learn(self, batch):
        answer = super().learn(batch).result()
        return Ready(answer if answer.step < self.at else self.change(answer))


def spoilt(what):
    def change(answer):
        gradient = answer.gradient.copy()
        match what:
            case "nan":
                gradient.flat[3] = np.nan
            case "shape":
                gradient = gradient[:, :-1]
            case "huge":
                gradient *= 1e12
            case "loss":
                return dataclasses.replace(answer, loss=float("nan"))
            case "raises":
                raise NonFiniteLossError("left", answer.step, float("nan"))
            case "blind":
                gradient = np.random.default_rng(answer.step).normal(0, 1e-3, gradient.shape).astype(np.float32)
        return dataclasses.replace(answer, gradient=gradient)

    return change


class Told:
    def __init__(self):
        self.stages, self.steps = [], []

    def on_stage(self, title):
        self.stages.append(title)

    def on_step(self, report):
        self.steps.append(report)

    def on_epoch(self, report):
        pass


def session_of(plan, *, change=None, at=0, **options):
    producer = LocalProducer(plan)
    consumers = []
    for task, offer in producer.offers().items():
        consumer = (Faulty if task == "left" and change else LocalConsumer)(offer, plan.consumer_config(task))
        consumer.at, consumer.change = at, change
        consumers.append(consumer)
    told = Told()
    session = Session(
        producer,
        consumers,
        steps_per_epoch=plan.steps_per_epoch,
        epochs=plan.config.epochs,
        observers=(told,),
        **options,
    )
    return session, told


def longer(plan, epochs=8, **changed):
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, epochs=epochs, **changed))


def test_honest_consumers_are_trained_to_the_same_bytes_with_and_without_the_guard(tiny_plan):
    outcomes = []
    for guard in (True, False):
        session, told = session_of(longer(tiny_plan, 12, guard=guard))
        session.start()
        session.run()
        outcomes.append(session.finish())
        assert not session.quarantined
        assert not told.stages
    assert weights_hash(outcomes[0].weights) == weights_hash(outcomes[1].weights)
    assert outcomes[0].test == outcomes[1].test


def test_honest_deep_heads_on_a_live_encoder_do_not_trip(tiny_plan):
    network = dataclasses.replace(tiny_plan.network, head="backbone")
    plan = dataclasses.replace(longer(tiny_plan, 8, lr=1e-3), network=network, frozen=False)
    session, told = session_of(plan)
    session.start()
    session.run()
    assert sum(n for *_, n in session.producer.producer._guard._records["left"].labels) > GuardConfig().evidence
    assert not session.quarantined and not told.stages


@pytest.mark.parametrize("what", ["nan", "shape", "huge", "loss", "raises"])
def test_a_tenant_that_breaks_in_the_first_step_is_as_if_it_had_never_been_there(tiny_plan, what):
    """To the byte, with the dissimilarity term and all."""
    session, told = session_of(tiny_plan, change=spoilt(what))
    session.start()
    reports = session.run()
    outcome = session.finish()
    alone = dataclasses.replace(tiny_plan, data=tiny_training_data(("bright",)))
    without, _ = session_of(alone)
    without.start()
    assert [r.losses for r in reports] == [r.losses for r in without.run()]
    expected = without.finish()
    for name, value in expected.weights.items():
        assert outcome.weights[name].equal(value), name
    assert outcome.test == expected.test
    assert set(outcome.heads) == {"bright"}
    assert set(outcome.quarantined) == {"left"}
    assert len(told.stages) == 1 and "left is in quarantine" in told.stages[0]


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen encoder", "live encoder"])
def test_from_the_quarantine_on_the_module_stays_and_the_tenant_gets_nothing(tiny_plan, frozen):
    plan = dataclasses.replace(longer(tiny_plan, 3), frozen=frozen)
    session, told = session_of(plan, change=spoilt("nan"), at=4)
    session.start()
    for _ in range(4):
        session.train_step()
    producer = session.producer.producer
    before = {n: v for n, v in producer.weights().items() if n.startswith("branches.task_left.")}
    assert before
    session.train_step()
    assert set(session.quarantined) == {"left"}
    assert set(told.steps[-1].losses) == {"bright"}
    assert set(session.producer.features(5)) == {"bright"}
    assert set(session.producer.evaluation_features("train")) == {"bright"}
    session.run()
    after = producer.weights()
    assert all(after[name].equal(value) for name, value in before.items())
    moved = [n for n, v in LocalProducer(plan).weights().items() if not after[n].equal(v)]
    assert any(n.startswith("branches.task_bright.") for n in moved)


def test_with_a_frozen_encoder_and_no_dissimilarity_the_others_never_notice(tiny_plan):
    plan = dataclasses.replace(
        longer(tiny_plan, 12), dissimilarity=dataclasses.replace(tiny_plan.dissimilarity, omega=0.0)
    )
    session, _ = session_of(plan, change=spoilt("blind"), at=2)
    session.start()
    session.run()
    outcome = session.finish()
    assert "do not follow its labels" in outcome.quarantined["left"]
    undisturbed, _ = session_of(plan)
    undisturbed.start()
    undisturbed.run()
    expected = undisturbed.finish()
    assert outcome.test["bright"] == expected.test["bright"]
    for name, value in expected.weights.items():
        assert outcome.weights[name].equal(value) == (not name.startswith("branches.task_left."))


def test_a_private_update_leaves_a_module_in_quarantine_without_noise(tiny_plan):
    from orchestrator.privacy.dp import DpBudget
    from orchestrator.updates import make_plan

    dp = make_plan(
        DpBudget(epsilon=8.0, noise_seed=1), n_train=40, batch_size=16, epochs=2, secret=3, mode="encoder_only_paper"
    )
    plan = dataclasses.replace(
        tiny_plan, frozen=False, dp=dp, dissimilarity=dataclasses.replace(tiny_plan.dissimilarity, omega=0.0)
    )
    session, _ = session_of(plan, change=spoilt("nan"))
    before = session.producer.weights()
    session.start()
    session.train_step()
    session.train_step()
    after = session.producer.weights()
    still = {name for name in before if after[name].equal(before[name])}
    assert still == {name for name in before if name.startswith("branches.task_left.")}


def test_a_session_that_goes_on_from_a_state_keeps_the_quarantine_and_decides_the_same(tiny_plan):
    plan = longer(tiny_plan, 12)
    whole, told = session_of(plan, change=spoilt("blind"), at=2)
    whole.start()
    whole.run()
    tripped = next(report.step for report in told.steps if report.quarantined)
    for stop in (tripped - 1, tripped + 2):
        first, _ = session_of(plan, change=spoilt("blind"), at=2)
        first.start()
        for _ in range(stop):
            first.train_step()
        second, heard = session_of(plan, change=spoilt("blind"), at=2)
        second.start(first.state_dict())
        second.run()
        assert second.quarantined == whole.quarantined
        assert weights_hash(second.producer.weights()) == weights_hash(whole.producer.weights())
        assert next(r.step for r in heard.steps if r.quarantined) == max(stop, tripped)


def test_when_nobody_is_left_the_session_ends_with_the_reasons(tiny_plan):
    plan = dataclasses.replace(tiny_plan, data=tiny_training_data(("left",)))
    session, _ = session_of(plan, change=spoilt("nan"))
    session.start()
    with pytest.raises(QuarantineError, match=r"no task was published.*left.*NaN or infinity"):
        session.run()


@pytest.mark.parametrize(
    ("what", "error"), [("nan", ProtocolError), ("loss", NonFiniteLossError), ("raises", NonFiniteLossError)]
)
def test_without_the_guard_one_broken_tenant_ends_the_session_for_all(tiny_plan, what, error):
    session, _ = session_of(longer(tiny_plan, 2, guard=False), change=spoilt(what), at=1)
    session.start()
    with pytest.raises(error):
        session.run()
