import json
import pickle

import pytest

from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.evaluation.attacks.linear import LinearAttack
from orchestrator.evaluation.budget import BUDGETS, AttackBudget


def test_the_full_budget_meets_what_a_claim_needs():
    full = AttackBudget.preset("full")
    assert full.seeds >= 3
    assert full.subsets == ("attacker", "train")
    assert {attack.name for attack in full.attacks} >= {"linear", "cnn"}


def test_a_preset_takes_another_number_of_seeds_and_an_unknown_one_lists_the_known():
    assert AttackBudget.preset("quick", seeds=4).seeds == 4
    with pytest.raises(UnknownNameError, match="full, quick"):
        AttackBudget.preset("huge")


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_every_budget_travels_and_says_its_settings(budget):
    assert pickle.loads(pickle.dumps(budget)) == budget
    written = json.loads(json.dumps(budget.to_json()))
    assert written["attacks"][1]["epochs"] == budget.attacks[1].epochs


def test_the_rest_of_a_backbone_is_one_more_attack():
    budget = AttackBudget.preset("quick").with_backbone("resnet18", 7)
    assert [attack.name for attack in budget.attacks] == ["linear", "cnn", "cnn_backbone"]
    assert budget.to_json()["attacks"][2]["split_index"] == 7


@pytest.mark.parametrize(
    "wrong",
    [
        {"attacks": ()},
        {"attacks": (LinearAttack(), LinearAttack())},
        {"seeds": 0},
        {"validation_fraction": 1.0},
        {"attacker_data": "test"},
    ],
)
def test_a_budget_that_means_nothing_is_refused(wrong):
    with pytest.raises(ConfigError):
        AttackBudget(**{"attacks": (LinearAttack(),), **wrong})
