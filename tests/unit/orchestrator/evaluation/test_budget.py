import json
import pickle

import pytest

from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.evaluation.attacks.linear import LinearAttack
from orchestrator.evaluation.budget import BUDGETS, AttackBudget
from orchestrator.evaluation.reconstruction.budget import ReconstructionBudget
from orchestrator.evaluation.report import CLAIM_ATTACKS, CLAIM_SEEDS


def test_the_full_budget_meets_what_a_claim_needs():
    budget = AttackBudget.preset("full")
    assert budget.seeds >= CLAIM_SEEDS
    assert budget.subsets == ("attacker", "train")
    assert {attack.name for attack in budget.attacks} >= set(CLAIM_ATTACKS)


def test_a_budget_can_be_cut_to_some_attacks_and_an_unknown_one_lists_the_known():
    some = AttackBudget.preset("full").only(["knn", "linear"])
    assert [attack.name for attack in some.attacks] == ["linear", "knn"]
    assert [attack.name for attack in some.collusion] == ["linear"]
    with pytest.raises(UnknownNameError, match="knn"):
        AttackBudget.preset("full").only(["oracle"])


def test_those_who_get_images_back_can_be_chosen_too():
    some = ReconstructionBudget.preset("full").only(["lookup", "decoder"])
    assert [attack.name for attack in some.attacks] == ["decoder", "lookup"]
    assert ReconstructionBudget.preset("full").needs_weights and not some.needs_weights
    with pytest.raises(UnknownNameError, match="decoder_staged"):
        ReconstructionBudget.preset("full").only(["oracle"])


def test_an_attacker_learns_from_its_own_rows_first_and_from_no_more_than_it_may():
    budget = AttackBudget(attacks=(LinearAttack(),), attacker_data="attacker+train", max_rows=100)
    few = budget.cut({"attacker": 50, "train": 200, "test": 10}, seed=3)
    assert {subset: len(rows) for subset, rows in few.learned.items()} == {"attacker": 40, "train": 60}
    assert not set(few.learned["attacker"]) & set(few.held_out)
    many = budget.cut({"attacker": 500, "train": 200}, seed=3)
    assert {subset: len(rows) for subset, rows in many.learned.items()} == {"attacker": 100, "train": 0}


def test_the_full_budget_has_every_kind_of_attacker_and_tenants_that_collude():
    suite = AttackBudget.preset("full")
    assert [attack.name for attack in suite.attacks] == [
        "linear",
        "mlp",
        "cnn",
        "adapter",
        "decensoring",
        "svm",
        "knn",
        "few_50",
        "few_500",
    ]
    assert [attack.name for attack in suite.collusion] == ["linear", "mlp", "cnn"]
    assert suite.needs_images


def test_the_quick_budget_is_small_and_needs_no_images():
    quick = AttackBudget.preset("quick")
    assert {attack.name for attack in quick.attacks} <= {"linear", "mlp", "cnn", "knn", "few_50"}
    assert (quick.seeds, quick.collusion, quick.needs_images) == (1, (), False)


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
    assert budget.attacks[-1].name == "cnn_backbone"
    assert budget.to_json()["attacks"][-1]["split_index"] == 7


@pytest.mark.parametrize(
    "wrong",
    [
        {"attacks": ()},
        {"attacks": (LinearAttack(), LinearAttack())},
        {"collusion": (LinearAttack(), LinearAttack())},
        {"seeds": 0},
        {"validation_fraction": 1.0},
        {"attacker_data": "test"},
    ],
)
def test_a_budget_that_means_nothing_is_refused(wrong):
    with pytest.raises(ConfigError):
        AttackBudget(**{"attacks": (LinearAttack(),), **wrong})
