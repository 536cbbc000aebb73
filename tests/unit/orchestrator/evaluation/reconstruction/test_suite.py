import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from squares import mixed, squares

from orchestrator.errors import ConfigError, DataError, UnknownNameError
from orchestrator.evaluation.other_tables import reconstruction_sheet
from orchestrator.evaluation.reconstruction.base import pixels
from orchestrator.evaluation.reconstruction.baselines import Lookup
from orchestrator.evaluation.reconstruction.budget import RECONSTRUCTION_BUDGETS, ReconstructionBudget
from orchestrator.evaluation.reconstruction.judge import JudgeConfig, train_judge
from orchestrator.evaluation.reconstruction.suite import ShownFeature, evaluate_reconstruction
from orchestrator.evaluation.reconstruction.trained import TrainedDecoder
from orchestrator.network import NetworkConfig

SIZES = {"train": 60, "attacker": 160, "test": 60}
JUDGE = JudgeConfig(network=NetworkConfig(split_index=3, module="identity", head="linear"), epochs=1, min_steps=60)
DECODER = TrainedDecoder(width=8, epochs=1, min_steps=150, checks=3, loss="mse")
BUDGET = ReconstructionBudget(attacks=(DECODER,), seeds=1, judge=JUDGE)


class Crashing:
    """Crashes on every seed but those that it is told to spare."""

    name = "crashing"

    def __init__(self, spared=()):
        self.spared = spared

    def run(self, data):
        if data.seed not in self.spared:
            raise MemoryError("no room")
        return pixels(data.test_x)


class Copying:
    """Knows the answer; for the arithmetic around it."""

    name = "copying"

    def run(self, data):
        return pixels(data.test_x)


class Blind:
    """Answers with the mean image."""

    name = "blind"

    def run(self, data):
        return pixels(data.train_x).mean(dim=0).expand(len(data.test_x), -1, -1, -1)


def brightness(images):
    """Which colour channel is the strongest."""
    return images.reshape(len(images), -1, 3).astype(np.int64).sum(axis=1).argmax(axis=1)


@pytest.fixture(scope="module")
def ground():
    images = {subset: squares(n, seed=i) for i, (subset, n) in enumerate(SIZES.items())}
    labels = {"colour": {subset: brightness(x) for subset, x in images.items()}}
    return images, labels, {"colour": 3}


def shown(images, encode=mixed, **more):
    return {"encoder": ShownFeature(features={subset: encode(x) for subset, x in images.items()}, **more)}


def constant(images):
    return np.ones((len(images), 2, 4, 4), dtype=np.float32)


def evaluate(ground, *, encode=mixed, budget=BUDGET, seed=0, labelled=True, **more):
    images, labels, n_classes = ground
    given = (labels, n_classes) if labelled else ({}, {})
    return evaluate_reconstruction(shown(images, encode), images, *given, budget=budget, seed=seed, **more)


def without_seconds(report):
    written = report.to_json()
    for row in written["rows"]:
        for attack in row["attacks"]:
            for result in attack["results"]:
                del result["seconds"]
    return written


def test_a_feature_that_keeps_the_image_gives_it_back_and_the_judge_recognises_it(ground):
    row = evaluate(ground).row("encoder")
    target = row.targets[0]
    assert row.best.mean("ssim") > 0.9 > row.mean_image.ssim + 0.3
    assert target.real > target.baseline + 0.2
    assert row.best.recognised("colour") > target.real - 0.15
    assert row.best.mean("perceptual_proxy") < 0.3 * row.mean_image.perceptual_proxy
    assert not row.obfuscated


def balanced(ground):
    """As many test images of each class: one answer for all of them is then right as often as any other."""
    images, labels, n_classes = ground
    colours = labels["colour"]["test"]
    n = np.bincount(colours, minlength=3).min()
    kept = np.concatenate([np.flatnonzero(colours == k)[:n] for k in range(3)])
    test = {"test": images["test"][kept]}
    return {**images, **test}, {"colour": {**labels["colour"], "test": colours[kept]}}, n_classes


def test_a_feature_that_keeps_nothing_may_be_called_obfuscating_after_three_seeds(ground):
    ground = balanced(ground)
    budget = dataclasses.replace(BUDGET, attacks=(dataclasses.replace(DECODER, min_steps=10), Blind()), seeds=3)
    row = evaluate(ground, encode=constant, budget=budget).row("encoder")
    assert abs(row.best.gain) < 0.03
    assert row.claim_obstacle is None
    assert "input obfuscated" in row.sentence
    one = evaluate(ground, encode=constant, budget=dataclasses.replace(budget, seeds=1)).row("encoder")
    assert one.claim_obstacle == "1 seed(s) per attack; a claim needs 3"


def test_ssim_alone_does_not_license_the_claim_where_the_judge_still_recognises(ground):
    class Hinting:
        name = "hinting"

        def run(self, data):
            strongest = np.eye(3, dtype=np.float32)[brightness(data.test_x)]
            mean = pixels(data.train_x).mean(dim=0)
            return (mean * (0.4 + torch.from_numpy(strongest)[:, :, None, None])).clamp(0, 1)

    row = evaluate(ground, budget=dataclasses.replace(BUDGET, attacks=(Hinting(),), seeds=3)).row("encoder")
    assert row.best.gain < 0.05
    assert "'colour' is recognised at" in row.claim_obstacle


def test_a_judge_that_knows_nothing_of_real_images_clears_nobody(ground):
    images, labels, n_classes = ground
    rng = np.random.default_rng(0)
    noise = {"colour": {subset: rng.integers(0, 3, len(y)) for subset, y in labels["colour"].items()}}
    budget = dataclasses.replace(BUDGET, attacks=(Blind(),), seeds=3)
    row = evaluate_reconstruction(shown(images), images, noise, n_classes, budget=budget, seed=0).row("encoder")
    assert "the judge of 'colour' recognises real images" in row.claim_obstacle


def test_the_baselines_need_no_feature_and_are_scored_on_the_same_rows(ground):
    budget = dataclasses.replace(BUDGET, attacks=(Blind(), Copying()))
    report = evaluate(ground, encode=constant, budget=budget, labelled=False)
    row = report.row("encoder")
    blind, copying = row.attacks
    assert blind.gain == pytest.approx(0.0, abs=1e-9)
    assert copying.mean("ssim") == pytest.approx(1.0, abs=1e-6)
    assert copying.gain == pytest.approx(1 - row.mean_image.ssim, abs=1e-6)
    assert row.mean_image.ssim < row.nearest_image.ssim < 1
    assert row.targets == ()


def test_a_task_s_own_label_is_no_target_of_its_feature_and_sets_the_floor_of_the_others(ground):
    images, labels, _ = ground
    twin = {"colour": labels["colour"], "twin": labels["colour"]}
    given = shown(images, task="colour")
    budget = dataclasses.replace(BUDGET, attacks=(Blind(),))
    row = evaluate_reconstruction(given, images, twin, {"colour": 3, "twin": 3}, budget=budget, seed=0).rows[0]
    assert [(target.target, target.baseline) for target in row.targets] == [("twin", 1.0)]


def test_the_class_mean_is_the_mean_of_the_attackers_images_that_got_the_same_answer(ground):
    images, labels, _ = ground
    given = shown(images, task="colour", answers=labels["colour"])
    budget = dataclasses.replace(BUDGET, attacks=(Copying(), Blind()), judge=None)
    report = evaluate_reconstruction(given, images, {}, {}, budget=budget, seed=0, n_examples=60)
    row = report.rows[0]
    test, rows = report.originals, budget.cut({s: len(x) for s, x in images.items()}, 0).of(labels["colour"])
    known = budget.cut({s: len(x) for s, x in images.items()}, 0).of(images)
    guess = np.stack([known[rows == k].mean(axis=0) for k in brightness(test)])
    np.testing.assert_allclose(row.class_mean_examples, guess, atol=1)
    squared = np.square((guess - test) / 255).mean(axis=(1, 2, 3))
    assert row.class_mean.psnr == pytest.approx(-10 * np.log10(squared).mean(), abs=0.02)
    copying, blind = row.attacks
    assert copying.over_class("ssim") == pytest.approx(1 - row.class_mean.ssim)
    assert blind.over_class("psnr") == pytest.approx(row.mean_image.psnr - row.class_mean.psnr)
    assert f"mean image of the class {row.class_mean.ssim:.3f}" in row.sentence
    written = json.loads(json.dumps(report.to_json()))["rows"][0]
    assert written["class_mean"]["psnr"] == row.class_mean.psnr
    assert written["attacks"][0]["ssim_over_class"] == pytest.approx(1 - row.class_mean.ssim)
    names = [cells[1] for cells in reconstruction_sheet(report).rows]
    assert names == ["mean image", "class mean", "nearest image", "copying", "blind"]


def test_of_a_feature_that_is_only_the_answer_no_decoder_makes_more_than_the_class_mean(ground):
    images, labels, _ = ground

    def one_hot(x):
        return np.eye(3, dtype=np.float32)[brightness(x)][:, :, None, None]

    budget = dataclasses.replace(BUDGET, judge=None)
    found = {
        name: evaluate_reconstruction(
            shown(images, encode, task="colour", answers=labels["colour"]), images, {}, {}, budget=budget, seed=0
        ).rows[0]
        for name, encode in {"answer": one_hot, "image": mixed}.items()
    }
    assert found["answer"].best.over_class("psnr") < 0.1
    assert found["image"].best.over_class("psnr") > 3, "and it shows where a feature keeps more"


def test_what_a_feature_adds_to_its_answer_is_what_the_same_attack_makes_of_both(ground):
    """Nothing where the feature is the answer, whatever loss the attack was trained for."""
    images, labels, _ = ground
    attack = dataclasses.replace(DECODER, loss="mse_ssim")
    budget = dataclasses.replace(BUDGET, attacks=(attack, Blind()), judge=None, seeds=2, from_answer=("decoder",))

    def one_hot(x):
        return np.eye(3, dtype=np.float32)[brightness(x)]

    titles = []
    reports = {
        name: evaluate_reconstruction(
            shown(images, encode, task="colour", answers=labels["colour"]),
            images,
            {},
            {},
            budget=budget,
            seed=0,
            progress=lambda _done, _all, job, _result: titles.append(job.title),
        )
        for name, encode in {"answer": one_hot, "image": mixed}.items()
    }
    assert titles[:6] == 2 * ["decoder on encoder"] + 2 * ["decoder on the answer of encoder"] + 2 * [
        "blind on encoder"
    ]
    for measure in ("psnr", "ssim"):
        assert reports["answer"].rows[0].attacks[0].over_answer(measure) == 0
    row = reports["image"].rows[0]
    decoder, blind = row.attacks
    assert decoder.over_answer("psnr") > 3
    assert blind.from_answer is None and np.isnan(blind.over_answer("psnr"))
    alone = decoder.from_answer
    assert f"decoder of the answer alone {alone.mean('ssim'):.3f}, {alone.mean('psnr'):.1f} dB; " in row.sentence
    written = json.loads(json.dumps(row.to_json()))["attacks"]
    assert written[0]["from_answer"]["psnr"] == alone.mean("psnr") and written[1]["from_answer"] is None
    sheet = reconstruction_sheet(reports["image"])
    names = [cells[1] for cells in sheet.rows]
    assert names == ["mean image", "class mean", "nearest image", "decoder of the answer", "decoder", "blind"]
    assert "taught from that answer" in sheet.note


def test_the_answer_is_asked_only_where_a_head_answers_and_the_attack_is_among_those_chosen(ground):
    full = RECONSTRUCTION_BUDGETS["full"]
    assert full.only(["decoder", "lookup"]).from_answer == ("decoder",) and full.only(["lookup"]).from_answer == ()
    with pytest.raises(UnknownNameError, match="oracle"):
        dataclasses.replace(BUDGET, from_answer=("oracle",))
    budget = dataclasses.replace(BUDGET, attacks=(Blind(),), from_answer=("blind",))
    report = evaluate(ground, budget=budget, labelled=False)
    assert report.rows[0].attacks[0].from_answer is None
    assert "taught from" not in reconstruction_sheet(report).note


def test_an_answer_that_the_attacker_never_saw_gets_the_mean_image(ground):
    images, labels, _ = ground
    odd = {**labels["colour"], "test": np.full(len(images["test"]), 7)}
    budget = dataclasses.replace(BUDGET, attacks=(Blind(),), judge=None)
    row = evaluate_reconstruction(shown(images, answers=odd), images, {}, {}, budget=budget, seed=0).rows[0]
    assert row.class_mean == row.mean_image


def test_without_a_head_there_is_no_class_mean(ground):
    row = evaluate(ground, budget=dataclasses.replace(BUDGET, attacks=(Blind(),)), labelled=False).rows[0]
    assert row.class_mean is None and "class" not in row.sentence
    assert row.to_json()["class_mean"] is None and row.to_json()["attacks"][0]["ssim_over_class"] is None


def test_a_crash_is_reported_as_a_crash_and_not_as_privacy(ground):
    budget = dataclasses.replace(BUDGET, attacks=(Crashing(),), seeds=3)
    row = evaluate(ground, budget=budget, labelled=False).row("encoder")
    assert (row.best, row.obfuscated, row.claim_obstacle) == (None, False, "crashed: crashing")
    assert row.attacks[0].results[0].crashed == "MemoryError: no room"
    written = json.loads(json.dumps(evaluate(ground, budget=budget, labelled=False).to_json(), allow_nan=False))
    assert written["rows"][0]["attacks"][0]["ssim"] is None


def test_seeds_that_crash_enter_no_mean_and_forbid_the_claim(ground):
    budget = dataclasses.replace(BUDGET, attacks=(Crashing(spared=(1,)), Blind()), seeds=3)
    row = evaluate(ground, budget=budget, labelled=False).row("encoder")
    assert (row.attacks[0].crashed, len(row.attacks[0].completed)) == (2, 1)
    assert row.attacks[0].mean("ssim") == pytest.approx(1.0, abs=1e-6)
    assert row.claim_obstacle == "crashed: crashing"


def test_the_seed_decides_everything_and_the_process_keeps_its_own_randomness(ground):
    decoder, judge = dataclasses.replace(DECODER, min_steps=10), dataclasses.replace(JUDGE, min_steps=5)
    quick = dataclasses.replace(BUDGET, attacks=(decoder,), judge=judge)
    before = torch.get_rng_state()
    first = without_seconds(evaluate(ground, budget=quick, seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    assert without_seconds(evaluate(ground, budget=quick, seed=3)) == first
    assert without_seconds(evaluate(ground, budget=quick, seed=4)) != first


def test_jobs_that_travel_give_the_same_report(ground):
    quick = dataclasses.replace(BUDGET, attacks=(Lookup(), Blind()), seeds=2)

    def elsewhere(function, jobs):
        travelled = pickle.loads(pickle.dumps(list(reversed(jobs))))
        assert len(pickle.dumps(travelled[0])) < 1000
        work = pickle.loads(pickle.dumps(function))
        return reversed([work(job) for job in travelled])

    here = without_seconds(evaluate(ground, budget=quick, labelled=False))
    assert without_seconds(evaluate(ground, budget=quick, labelled=False, run=elsewhere)) == here


def test_a_job_whose_process_died_answers_as_crashed(ground):
    lost = evaluate(ground, labelled=False, run=lambda _, jobs: [job.lost("WorkerCrashedError: gone") for job in jobs])
    assert lost.rows[0].attacks[0].results[0].crashed == "WorkerCrashedError: gone"


def test_no_picture_is_kept_unless_it_was_asked_for_and_none_is_ever_written(ground):
    budget = dataclasses.replace(BUDGET, attacks=(Copying(),))
    silent = evaluate(ground, budget=budget, labelled=False)
    assert silent.originals is None
    assert silent.rows[0].attacks[0].results[0].examples is None
    kept = evaluate(ground, budget=budget, labelled=False, n_examples=3)
    np.testing.assert_array_equal(kept.originals, kept.rows[0].attacks[0].results[0].examples)
    assert kept.to_json() == silent.to_json() | {"rows": kept.to_json()["rows"]}
    assert "examples" not in json.dumps(kept.to_json())


def test_attackers_get_disjoint_rows_and_never_a_test_row(ground):
    seen = []

    class Peeking(Blind):
        def run(self, data):
            seen.append(data)
            return super().run(data)

    budget = dataclasses.replace(BUDGET, attacks=(Peeking(),), attacker_data="attacker+train", max_test=30)
    evaluate(ground, budget=budget, labelled=False)
    data = seen[0]
    assert (len(data.train_x), len(data.validation_x), len(data.test_x)) == (128 + 60, 32, 30)
    rows = [{x.tobytes() for x in part} for part in (data.train_x, data.validation_x, data.test_x)]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    np.testing.assert_allclose(data.train_z, mixed(data.train_x), atol=1e-6)
    small = dataclasses.replace(budget, max_rows=100)
    evaluate(ground, budget=small, labelled=False)
    assert len(seen[1].train_x) == 100


def test_the_judge_answers_the_same_for_the_same_seed(ground):
    images, labels, n_classes = ground
    known = {"colour": labels["colour"]["train"]}
    config = dataclasses.replace(JUDGE, min_steps=5)
    first, again = (train_judge(images["train"], known, n_classes, config=config, seed=7) for _ in range(2))
    x = pixels(images["test"])
    assert torch.equal(first(x)["colour"], again(x)["colour"])
    assert not any(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda s, x, y, k: ({}, x, y, k), DataError, "no feature"),
        (lambda s, x, y, k: (s, {n: v for n, v in x.items() if n != "test"}, y, k), DataError, "lack the subset test"),
        (lambda s, x, y, k: (s, {**x, "test": x["test"][:5]}, y, k), DataError, "60 test features of 'encoder' but 5"),
        (lambda s, x, y, k: (s, x, y, {}), UnknownNameError, "'colour'"),
        (lambda s, x, y, k: (shown(x, answers={}), x, y, k), DataError, "0 attacker answers of the head of 'encoder'"),
        (
            lambda s, x, y, k: (s, x, {"colour": y["colour"] | {"test": y["colour"]["test"][:1]}}, k),
            DataError,
            "1 test",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_anything_runs(ground, spoil, error, message):
    images, labels, n_classes = ground
    with pytest.raises(error, match=message):
        evaluate_reconstruction(
            *spoil(shown(images), images, labels, n_classes), budget=BUDGET, seed=0, run=lambda *_: pytest.fail("ran")
        )


def test_the_table_has_every_attack_beside_the_baselines(ground):
    budget = dataclasses.replace(BUDGET, attacks=(Blind(), Crashing()))
    sheet = reconstruction_sheet(evaluate(ground, budget=budget, labelled=False))
    assert sheet.names == ["feature", "from", "PSNR dB", "SSIM", "MS-SSIM", "L1"]
    rows = [row for row in sheet.rows if row[0] == "encoder"]
    assert [row[1] for row in rows] == ["mean image", "nearest image", "blind", "crashing"]
    assert rows[3][2:] == ["crashed", "-", "-", "-"]
    assert "nothing is claimed" in sheet.note


def test_the_table_has_a_column_for_every_attribute_that_the_judge_was_asked_about(ground):
    sheet = reconstruction_sheet(evaluate(ground, budget=BUDGET))
    assert sheet.names[-2:] == ["perceptual proxy", "colour"]
    of_encoder = {row[1]: row[-1] for row in sheet.rows if row[0] == "encoder"}
    assert float(of_encoder["real images"]) > float(of_encoder["no image"])


@pytest.mark.parametrize("name", RECONSTRUCTION_BUDGETS)
def test_budgets_are_json(name):
    written = json.loads(json.dumps(ReconstructionBudget.preset(name, seeds=2).to_json()))
    assert written["seeds"] == 2
    assert {attack["name"] for attack in written["attacks"]} >= {"decoder", "lookup"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"attacks": ()},
        {"attacks": (Blind(), Blind())},
        {"seeds": 0},
        {"validation_fraction": 1.0},
        {"max_rows": 1},
    ],
)
def test_a_budget_that_measures_nothing_is_refused(wrong):
    with pytest.raises(ConfigError):
        dataclasses.replace(BUDGET, **wrong)
