import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.errors import DataError, UnknownNameError
from orchestrator.evaluation.attacks.adapter import AdapterAttack
from orchestrator.evaluation.attacks.base import AttackResult
from orchestrator.evaluation.attacks.decensoring import DecensoringAttack
from orchestrator.evaluation.attacks.linear import LinearAttack
from orchestrator.evaluation.attacks.mlp import MlpAttack
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.floors import label_floor
from orchestrator.evaluation.leakage import TaskFeatures, evaluate_leakage
from tasks.spec import TaskSpec

SIZES = {"train": 120, "attacker": 200, "test": 400}
LINEAR = AttackBudget(attacks=(LinearAttack(),), seeds=1)


class Crashing:
    """Crashes on every seed but those that it is told to spare."""

    name = "crashing"

    def __init__(self, spared=()):
        self.spared = spared

    def run(self, data):
        if data.seed not in self.spared:
            raise MemoryError("no room")
        return AttackResult(attack=self.name, seed=data.seed, correct=300, total=400, accuracy=0.75)


class Peeking:
    """Answers with what it was given."""

    name = "peeking"

    def __init__(self):
        self.seen = []

    def run(self, data):
        self.seen.append(data)
        return AttackResult(attack=self.name, seed=data.seed, correct=1, total=2, accuracy=0.5)


class Channels(nn.Module):
    """A head that reads the class off the channels it is told to, the largest one."""

    def __init__(self, *channels):
        super().__init__()
        self.channels = channels

    def forward(self, z):
        return z.mean(dim=(2, 3))[:, list(self.channels)]


def spec(name, n=2):
    return TaskSpec(name=name, target=name, classes=tuple(map(str, range(n))))


@pytest.fixture
def world():
    """Independent bits a, b and secret s. Task a's feature holds a in channels 0, 1 and b in 2, 3; task b's only noise
    and b. Heads read the channels that hold their label in their own feature."""
    rng = np.random.default_rng(0)
    labels = {name: {subset: rng.integers(0, 2, n) for subset, n in SIZES.items()} for name in ("a", "b", "s")}

    def feature(first, second):
        made = {}
        for subset, n in SIZES.items():
            z = 0.3 * rng.normal(size=(n, 4, 2, 2))
            for channel, name in ((0, first), (2, second)):
                if name:
                    z[np.arange(n), channel + labels[name][subset]] += 2
            made[subset] = z.astype(np.float32)
        return made

    features = {
        "a": TaskFeatures(spec=spec("a"), features=feature("a", "b"), head=Channels(0, 1)),
        "b": TaskFeatures(spec=spec("b"), features=feature("b", None), head=Channels(0, 1)),
        "s": TaskFeatures(spec=spec("s"), private=True, features=feature("s", None), head=Channels(0, 1)),
    }
    return features, labels, {name: spec(name) for name in labels}


def evaluate(world, *, budget=LINEAR, seed=0, **more):
    return evaluate_leakage(*world, budget=budget, seed=seed, **more)


def test_what_a_feature_holds_is_found_and_what_it_does_not_hold_is_not(world):
    report = evaluate(world)
    held, absent = report.row("a", "b"), report.row("b", "a")
    assert held.leak == pytest.approx(1.0, abs=0.01)
    assert held.excess == pytest.approx(held.leak - max(held.floor.accuracy, held.chance))
    assert held.excess > 0.4
    assert abs(absent.excess) < 0.06
    assert report.own == {"a": 1.0, "b": 1.0, "s": 1.0}


def test_the_private_feature_is_a_target_and_never_an_input(world):
    given = []

    def watch(function, jobs):
        given.append(pickle.dumps((function, jobs)))
        return map(function, jobs)

    report = evaluate(world, run=watch)
    assert [(row.feature, row.target) for row in report.rows] == [("a", "b"), ("a", "s"), ("b", "a"), ("b", "s")]
    assert report.private == {"s"}
    _, jobs = pickle.loads(given[0])
    assert world[0]["s"].features["test"].tobytes() not in given[0]
    assert world[0]["a"].features["test"].tobytes() in given[0]
    assert len(pickle.dumps(jobs[0])) < 1000


def test_jobs_that_travel_give_the_same_report(world):
    def elsewhere(function, jobs):
        answers = [
            pickle.loads(pickle.dumps(function))(job) for job in pickle.loads(pickle.dumps(list(reversed(jobs))))
        ]
        return reversed(answers)

    assert without_seconds(evaluate(world, run=elsewhere)) == without_seconds(evaluate(world))


def without_seconds(report):
    written = report.to_json()
    for row in written["rows"]:
        for attack in row["attacks"]:
            for result in attack["results"]:
                del result["seconds"]
    return written


def test_the_seed_decides_everything(world):
    assert without_seconds(evaluate(world, seed=1)) == without_seconds(evaluate(world, seed=1))


def test_swap_reads_the_channels_of_the_other_head(world):
    labels = world[1]
    row = evaluate(world).row("a", "b")
    assert row.swap == (labels["a"]["test"] == labels["b"]["test"]).mean()  # M_b looks where a is


def test_swap_perm_puts_an_inverted_head_right(world):
    features, labels, specs = world
    inverted = TaskFeatures(spec=spec("b"), features=features["b"].features, head=Channels(3, 2))
    row = evaluate(({**features, "b": inverted}, labels, specs)).row("a", "b")
    assert row.swap == pytest.approx(0.0, abs=0.01)
    assert row.swap_perm == 1 - row.swap


def test_swap_is_left_out_where_the_head_takes_another_shape_or_is_not_to_be_had(world):
    features, labels, specs = world
    wide = {subset: np.repeat(z, 2, axis=1) for subset, z in features["b"].features.items()}
    report = evaluate(({**features, "b": TaskFeatures(spec=spec("b"), features=wide)}, labels, specs))
    assert (report.row("a", "b").swap, report.row("b", "a").swap) == (None, None)
    assert report.own["b"] is None


def test_a_label_column_without_a_feature_is_a_target(world):
    features, labels, specs = world
    report = evaluate((features, {**labels, "c": labels["b"]}, {**specs, "c": spec("c")}))
    row = report.row("a", "c")
    assert row.leak == pytest.approx(1.0, abs=0.01)
    assert row.swap is None


def test_the_floor_is_what_the_label_of_the_feature_gives_away(world):
    features, labels, specs = world
    report = evaluate((features, {**labels, "c": labels["a"]}, {**specs, "c": spec("c")}))
    row = report.row("a", "c")
    assert row.floor.accuracy == 1.0
    assert row.excess <= 0.0


def test_a_crash_is_reported_as_a_crash_and_not_as_privacy(world):
    report = evaluate(world, budget=AttackBudget(attacks=(Crashing(),), seeds=3))
    row = report.rows[0]
    assert (row.leak, row.excess, row.best) == (None, None, None)
    assert not row.chance_claim_allowed
    assert row.claim_obstacle == "crashed: crashing"
    assert row.attacks[0].results[0].crashed == "MemoryError: no room"
    assert report.worst is None
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["rows"][0]["attacks"][0]["accuracy"] is None


def test_seeds_that_crash_enter_no_mean_and_forbid_the_claim(world):
    summary = evaluate(world, budget=AttackBudget(attacks=(Crashing(spared=(1,)),), seeds=3)).rows[0].attacks[0]
    assert (summary.mean("accuracy"), summary.accuracy_max, summary.crashed) == (0.75, 0.75, 2)
    row = evaluate(world, budget=AttackBudget(attacks=(LinearAttack(), Crashing()), seeds=3)).row("b", "a")
    assert row.leak == row.attacks[0].mean("accuracy")
    assert row.claim_obstacle == "crashed: crashing"


def test_attackers_get_disjoint_rows_and_validate_on_rows_the_defence_never_saw(world):
    features, _, _ = world
    peeking = Peeking()
    evaluate(world, budget=AttackBudget(attacks=(peeking,), seeds=2, attacker_data="attacker+train"))
    first, second = peeking.seen[:2]
    z = features["a"].features
    assert (len(first.train_y), len(first.validation_y), len(first.test_y)) == (160 + 120, 40, 400)
    known = np.concatenate([first.train_z, first.validation_z])
    assert {row.tobytes() for row in known} == {row.tobytes() for row in [*z["attacker"], *z["train"]]}
    assert {row.tobytes() for row in first.validation_z} <= {row.tobytes() for row in z["attacker"]}
    assert not np.array_equal(first.validation_z, second.validation_z)
    np.testing.assert_array_equal(first.test_z, z["test"])


def test_progress_is_told_after_every_job(world):
    calls = []
    evaluate(world, progress=lambda done, total, job, result: calls.append((done, total, job.target, result.attack)))
    assert calls == [(1, 4, "b", "linear"), (2, 4, "s", "linear"), (3, 4, "a", "linear"), (4, 4, "s", "linear")]


def test_a_runner_that_loses_results_is_noticed(world):
    with pytest.raises(ValueError, match="shorter"):
        evaluate(world, run=lambda function, jobs: [function(job) for job in jobs[1:]])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f, y, s: (f, y, {k: v for k, v in s.items() if k != "s"}), UnknownNameError, "'s'"),
        (lambda f, y, s: (f, {**y, "b": {"test": y["b"]["test"]}}, s), DataError, "'b' lack the subset.*attacker"),
        (lambda f, y, s: (f, {k: v for k, v in y.items() if k != "b"}, s), DataError, "'b' need labels"),
        (lambda f, y, s: ({"s": f["s"]}, y, s), DataError, "nothing to attack"),
        (lambda f, y, s: (f, {**y, "b": {**y["b"], "test": y["b"]["test"][:-1]}}, s), DataError, "400 test features"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_anything_runs(world, spoil, error, message):
    with pytest.raises(error, match=message):
        evaluate(spoil(*world), run=lambda function, jobs: pytest.fail("ran"))


@pytest.mark.parametrize("change", [{"head": "depth_map"}, {"loss": "l1"}])
def test_a_target_that_has_no_classes_is_refused_before_anything_runs(world, change):
    features, labels, specs = world
    other = {**specs, "s": dataclasses.replace(specs["s"], **change)}
    with pytest.raises(DataError, match=r"'s' is no classification task.*needed: 'classifier', 'cross_entropy'"):
        evaluate((features, labels, other), run=lambda function, jobs: pytest.fail("ran"))


def test_the_feature_of_a_task_that_answers_with_a_map_is_attacked_and_has_no_label_of_its_own(world):
    features, labels, specs = world
    dense = TaskSpec(name="d", target="d", shape=(1, 2, 2), head="map", loss="mse", metrics=("psnr",))
    given = {"d": dataclasses.replace(features["a"], spec=dense), "b": features["b"]}
    report = evaluate((given, labels, specs), budget=dataclasses.replace(LINEAR, collusion=LINEAR.attacks))
    row = report.row("d", "b")
    assert row.leak == pytest.approx(1.0, abs=0.01)
    known = np.concatenate([labels["b"][subset] for subset in LINEAR.subsets])
    majority = np.bincount(known).argmax()
    assert row.floor.accuracy == pytest.approx((labels["b"]["test"] == majority).mean()), "no label gives anything away"
    assert report.own["d"] is None
    together = next(row for row in report.collusion if row.feature == "d + b" and row.target == "a")
    alone = report.row("b", "a")
    assert together.floor == alone.floor, "of the other's label alone"


def shared_secret(world):
    """Task a's feature holds a random share, b's the share that makes s of it; each alone is a coin toss."""
    features, labels, specs = world
    rng = np.random.default_rng(7)
    shares = {subset: rng.integers(0, 2, n) for subset, n in SIZES.items()}

    def feature(bits):
        made = {}
        for subset, n in SIZES.items():
            z = 0.3 * rng.normal(size=(n, 4, 2, 2))
            z[:, 0] += 2 * (2 * bits[subset] - 1)[:, None, None]
            made[subset] = z.astype(np.float32)
        return made

    halves = {"a": shares, "b": {subset: shares[subset] ^ labels["s"][subset] for subset in SIZES}}
    split = {task: dataclasses.replace(features[task], features=feature(bits)) for task, bits in halves.items()}
    return {**features, **split}, labels, specs


def test_a_secret_that_two_tenants_share_is_read_by_both_together_and_by_neither_alone(world):
    mlp = MlpAttack(width=32, epochs=1, min_steps=300, batch_size=32)
    report = evaluate(shared_secret(world), budget=AttackBudget(attacks=(mlp,), collusion=(mlp,), seeds=1))
    (together,) = report.collusion
    assert (together.feature, together.target, together.swap) == ("a + b", "s", None)
    assert together.leak > 0.95
    assert abs(report.row("a", "s").excess) < 0.08
    assert abs(report.row("b", "s").excess) < 0.08
    assert report.apart(together) == max(report.row(feature, "s").leak for feature in "ab")
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))["collusion"][0]
    assert (written["leak"], written["leak_apart"]) == (together.leak, report.apart(together))
    assert [row["feature"] for row in report.to_json()["rows"]] == ["a", "a", "b", "b"]


def test_the_floor_of_a_coalition_comes_from_both_labels(world):
    features, labels, specs = world
    differ = {subset: labels["a"][subset] ^ labels["b"][subset] for subset in SIZES}
    budget = AttackBudget(attacks=(LinearAttack(),), collusion=(LinearAttack(),), seeds=1)
    report = evaluate((features, {**labels, "c": differ}, {**specs, "c": spec("c")}), budget=budget)
    row = next(row for row in report.collusion if row.target == "c")
    assert row.floor.accuracy == 1.0
    assert report.row("a", "c").floor.accuracy < 0.6


def test_a_coalition_may_forget_a_label_that_only_thins_out_what_the_other_says(world):
    """Of 400 pairs of labels most were seen once or never, and the table of pairs knows less than that of one label."""
    features, labels, specs = world
    rng = np.random.default_rng(0)
    many = {subset: rng.integers(0, 200, n) for subset, n in SIZES.items()}
    nearly_a = {subset: labels["a"][subset] ^ (rng.random(n) < 0.1) for subset, n in SIZES.items()}
    given = {**labels, "b": many, "c": nearly_a}
    budget = AttackBudget(attacks=(LinearAttack(),), collusion=(LinearAttack(),), seeds=1)
    report = evaluate((features, given, {**specs, "b": spec("b", 200), "c": spec("c")}), budget=budget)
    row = next(row for row in report.collusion if row.target == "c")
    assert row.floor == report.row("a", "c").floor
    assert row.floor.accuracy > 0.85
    pairs = [200 * labels["a"][subset] + many[subset] for subset in ("attacker", "test")]
    assert label_floor((pairs[0], nearly_a["attacker"]), (pairs[1], nearly_a["test"])).accuracy < 0.8


def test_a_coalitions_crash_is_reported_as_a_crash(world):
    report = evaluate(world, budget=AttackBudget(attacks=(LinearAttack(),), collusion=(Crashing(),), seeds=1))
    assert [row.claim_obstacle for row in report.collusion] == ["crashed: crashing"]


def test_attackers_get_the_head_of_the_targets_tenant_and_images_of_their_own_rows_alone(world):
    features = world[0]
    images = {subset: np.full((n, 2, 2, 3), k, np.uint8) for k, (subset, n) in enumerate(SIZES.items())}
    images["attacker"] += np.arange(SIZES["attacker"], dtype=np.uint8)[:, None, None, None]
    peeking = Peeking()
    evaluate(world, budget=AttackBudget(attacks=(peeking,), seeds=1), images=images)
    given = peeking.seen[0]
    assert given.head.module is features["b"].head
    assert given.head.feature_shape == (4, 2, 2)
    owned = np.concatenate([given.train_images, given.validation_images])
    z = np.concatenate([given.train_z, given.validation_z])
    for image, feature in zip(owned, z, strict=True):
        row = int(image[0, 0, 0]) - 1
        assert (features["a"].features["attacker"][row] == feature).all()
    with pytest.raises(DataError, match="3 attacker images but 200 labels"):
        evaluate(world, images={**images, "attacker": images["attacker"][:3]})


def test_an_attack_that_lacks_what_it_needs_is_neither_a_crash_nor_an_obstacle(world):
    features, labels, specs = world
    headless = {task: dataclasses.replace(given, head=None) for task, given in features.items()}
    needy = (AdapterAttack(), DecensoringAttack())
    row = evaluate((headless, labels, specs), budget=AttackBudget(attacks=(*needy, LinearAttack()), seeds=3)).row(
        "a", "b"
    )
    assert [summary.skipped is not None for summary in row.attacks] == [True, True, False]
    assert [summary.crashed for summary in row.attacks] == [0, 0, 0]
    assert row.best.attack == "linear"
    assert "leak may be" in row.claim_obstacle
    nothing = evaluate((headless, labels, specs), budget=AttackBudget(attacks=needy, seeds=3)).rows[0]
    assert (nothing.leak, nothing.claim_obstacle) == (None, "not run: adapter, decensoring")


def test_a_private_task_that_is_not_asked_for_is_left_alone(world):
    features, labels, specs = world
    report = evaluate((features, {k: labels[k] for k in "ab"}, specs))
    assert report.targets == ("a", "b")
    assert report.own["s"] is None


def test_the_heads_and_the_process_are_left_as_they_were(world):
    features = world[0]
    features["b"].head.train()
    state = torch.get_rng_state()
    evaluate(world)
    assert features["b"].head.training
    assert torch.equal(torch.get_rng_state(), state)
