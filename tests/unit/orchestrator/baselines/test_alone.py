import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.baselines.alone import train_alone
from orchestrator.errors import NonFiniteLossError
from tasks.datasets.table import Normalisation
from tasks.spec import TaskSpec

SPEC = TaskSpec(name="side", target="side", classes=("left", "right"))
HALF = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
TRAIN, TEST = np.arange(100), np.arange(100, 140)


def table(*, seed=0, side=6, n=140):
    """Grey noise; the left or the right half is brighter."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    images = rng.integers(0, 100, (n, side, side, 3)).astype(np.uint8)
    for i, label in enumerate(labels):
        half = slice(side // 2, None) if label else slice(0, side // 2)
        images[i, :, half] += 100
    return images, labels


def linear_network(seed=0, side=6):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, 2))


def train(images, labels, network, **more):
    settings = {"flip": False, "train_ids": TRAIN, "test_ids": TEST, "epochs": 15, "batch_size": 20}
    settings |= {"learning_rate": 1e-2, "seed": 0, "normalisation": HALF, "spec": SPEC} | more
    return train_alone(images, labels, network=network, **settings)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_a_task_that_can_be_learned_is_learned():
    result = train(*table(), linear_network())
    assert result.metrics == {"accuracy": 1.0, "balanced_accuracy": 1.0, "auc": 1.0}


def test_the_steps_are_those_of_adamw_under_a_cosine_worked_out_by_hand():
    images, labels = table()
    network, oracle = linear_network(), linear_network()
    train(images, labels, network, epochs=3, batch_size=1000, weight_decay=0.1)
    x = torch.from_numpy(images[TRAIN]).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
    optimiser = torch.optim.AdamW(oracle.parameters(), lr=1e-2, weight_decay=0.1)
    for rate in (1e-2, 0.75e-2, 0.25e-2):  # (1 + cos(pi * step / 3)) / 2
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        nn.functional.cross_entropy(oracle(x), torch.from_numpy(labels[TRAIN])).backward()
        optimiser.step()
    torch.testing.assert_close(weights(network), weights(oracle), rtol=1e-4, atol=1e-6)


def test_mirrored_images_make_left_and_right_the_same():
    images, labels = table()
    assert train(images, labels, linear_network(), flip=True).metrics["accuracy"] < 0.75


def test_test_rows_are_never_trained_on():
    images, labels = table()
    clean, poisoned = linear_network(), linear_network()
    train(images, labels, clean)
    images[TEST] = 255 - images[TEST]
    labels[TEST] = 1 - labels[TEST]
    train(images, labels, poisoned)
    assert torch.equal(weights(clean), weights(poisoned))


def test_the_same_seed_gives_the_same_network_and_another_seed_another():
    images, labels = table()
    networks = [linear_network() for _ in range(3)]
    results = [
        train(images, labels, network, epochs=2, flip=True, seed=seed)
        for network, seed in zip(networks, (4, 4, 5), strict=True)
    ]
    assert torch.equal(weights(networks[0]), weights(networks[1]))
    assert not torch.equal(weights(networks[0]), weights(networks[2]))
    assert dataclasses.replace(results[0], seconds=0) == dataclasses.replace(results[1], seconds=0)


def test_frozen_parameters_stay_and_the_test_is_in_evaluation_mode():
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    network[1].requires_grad_(False)
    before = network[1].weight.clone()
    train(*table(), network)
    assert torch.equal(network[1].weight, before)
    assert not network.training


def test_progress_is_told_after_every_epoch_and_the_loss_falls():
    calls = []
    train(*table(), linear_network(), epochs=3, batch_size=30, progress=lambda *told: calls.append(told))
    assert [told[:2] for told in calls] == [(1, 3), (2, 3), (3, 3)]
    assert all(later[2] < earlier[2] for earlier, later in itertools.pairwise(calls))


def test_a_loss_that_is_not_finite_names_the_task_and_the_step():
    network = linear_network()
    with torch.no_grad():
        network[1].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="'side' is nan at step 0"):
        train(*table(), network)
