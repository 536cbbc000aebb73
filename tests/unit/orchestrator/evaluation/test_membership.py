import json
import math

import numpy as np
import pytest

from orchestrator.errors import DataError
from orchestrator.evaluation.membership import (
    LikelihoodRatio,
    LossThreshold,
    MembershipInput,
    PredictionEntropy,
    attack_membership,
    auc,
    confidence,
    false_positive_threshold,
    log_probabilities,
    score_membership,
)

N = 400


def answers(rng, labels, known, *, confident=4.0, hardness=None):
    """Logits of a model that is surer of what it knows: of ``known`` rows by ``confident``."""
    logits = rng.normal(size=(len(labels), 3))
    if hardness is not None:
        logits[np.arange(len(labels)), labels] += hardness
    logits[np.arange(len(labels)), labels] += confident * known
    return logits.astype(np.float32)


def world(confident, *, seed=0, hard=False, n_shadows=8):
    rng = np.random.default_rng(seed)
    labels, member = rng.integers(0, 3, N), np.arange(N) < N // 2
    hardness = 8 * rng.normal(size=N) if hard else None
    inside = rng.permuted(np.tile(np.arange(n_shadows) < n_shadows // 2, (N, 1)), axis=1).T
    shadows = [answers(rng, labels, known, confident=confident, hardness=hardness) for known in inside]
    return MembershipInput(
        logits=answers(rng, labels, member, confident=confident, hardness=hardness),
        labels=labels,
        member=member,
        shadow_logits=np.stack(shadows),
        shadow_member=inside,
        seed=seed,
    )


def test_a_model_that_memorises_is_found_by_every_attack():
    for result in attack_membership(world(12.0)):
        assert result.auc > 0.95
        assert result.auc_low > 0.5
        assert result.tpr > 0.5
        assert result.tpr_low > 0.01


def test_a_model_that_never_saw_the_data_is_at_chance():
    for result in attack_membership(world(0.0)):
        assert result.auc_low < 0.5 < result.auc_high
        assert result.tpr_low <= 0.01 + 1e-9
        assert result.false_positives <= 0.01 * N / 2


def test_shadow_models_tell_members_from_images_that_are_easy_anyway():
    loss, _, ratio = attack_membership(world(4.0, hard=True))
    assert (loss.attack, ratio.attack) == ("loss", "lira_lite")
    assert ratio.auc > loss.auc + 0.15
    assert ratio.tpr > loss.tpr + 0.2


def test_the_auc_is_the_share_of_pairs_in_the_right_order_and_ties_count_half():
    inside, outside = np.array([3.0, 1.0]), np.array([0.0, 1.0, 2.0])
    assert auc(inside, outside) == pytest.approx((3 + 1.5) / 6)
    assert auc(np.zeros(5), np.zeros(7)) == 0.5


def test_at_most_one_percent_of_the_others_lie_above_the_threshold():
    outside = np.arange(300.0)
    assert false_positive_threshold(outside) == 296
    assert (outside > false_positive_threshold(outside)).sum() == 3
    assert false_positive_threshold(np.arange(50.0)) == 49
    tied = np.ones(300)
    assert (tied > false_positive_threshold(tied)).sum() == 0


def test_the_interval_of_the_true_positive_rate_is_at_least_the_exact_one():
    scores = np.concatenate([np.r_[np.full(10, 9.0), np.zeros(90)], np.linspace(1, 2, 100)])
    result = score_membership(scores, np.arange(200) < 100, attack="known", seed=0)
    assert (result.tpr, result.false_positives) == (0.1, 1)
    assert 0.03 < result.tpr_low <= 0.0491
    assert 0.1761 <= result.tpr_high < 0.2


def test_intervals_of_the_auc_narrow_with_the_candidates():
    rng = np.random.default_rng(0)
    widths = []
    for n in (100, 2000):
        result = score_membership(rng.normal(size=2 * n), np.arange(2 * n) < n, attack="noise", seed=0)
        widths.append(result.auc_high - result.auc_low)
    assert widths[1] < 0.4 * widths[0]


def test_confidence_is_the_log_odds_and_does_not_round_to_infinity():
    logits = np.array([[2.0, 0.0, -1.0], [900.0, 0.0, 0.0]], dtype=np.float32)
    p = np.exp(log_probabilities(logits))[0, 0]
    odds = confidence(logits, np.array([0, 0]))
    assert odds[0] == pytest.approx(math.log(p / (1 - p)))
    assert odds[1] == pytest.approx(900 - math.log(2))


def test_no_attack_looks_at_the_truth():
    data = world(4.0)
    turned = MembershipInput(
        logits=data.logits,
        labels=data.labels,
        member=~data.member,
        shadow_logits=data.shadow_logits,
        shadow_member=data.shadow_member,
        seed=0,
    )
    for attack in (LossThreshold(), PredictionEntropy(), LikelihoodRatio()):
        np.testing.assert_array_equal(attack.run(data), attack.run(turned))


def test_without_shadow_models_the_thresholds_remain():
    data = world(4.0)
    bare = MembershipInput(logits=data.logits, labels=data.labels, member=data.member, seed=0)
    assert [result.attack for result in attack_membership(bare)] == ["loss", "entropy"]


def test_a_crash_is_reported_as_a_crash_and_not_as_privacy():
    class Crashing:
        name = "crashing"

        def run(self, data):
            return np.full(len(data.labels), np.nan)

    (result,) = attack_membership(world(4.0), (Crashing(),))
    assert result.crashed.startswith("FloatingPointError")
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["auc"] is None


def test_the_seed_decides_everything():
    def numbers(data):
        return [{k: v for k, v in r.to_json().items() if k != "seconds"} for r in attack_membership(data)]

    assert numbers(world(2.0, seed=5)) == numbers(world(2.0, seed=5))


def test_candidates_of_one_kind_only_are_refused():
    data = world(4.0)
    with pytest.raises(DataError, match="some of either kind"):
        MembershipInput(logits=data.logits, labels=data.labels, member=np.ones(N, dtype=bool), seed=0)
