import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.errors import ConfigError, DataError
from orchestrator.evaluation.membership import MembershipInput, attack_membership
from orchestrator.evaluation.shadows import Candidates, ShadowConfig, shadow_members, train_shadows
from orchestrator.network import BoundedNetworkConfig, NetworkConfig
from orchestrator.optimisation import OptimiserConfig
from orchestrator.privacy.bounded.channel import ChannelConfig
from tasks.datasets.table import Normalisation
from tasks.transforms import to_tensor

HALF = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
N = 60
CONFIG = ShadowConfig(models=4, epochs=1, min_steps=40, batch_size=16, optimiser=OptimiserConfig(lr=1e-2))


@dataclasses.dataclass(frozen=True)
class Memorising:
    """More weights than pixels to learn by heart."""

    def __call__(self, seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(8 * 8 * 3, 64), nn.ReLU(), nn.Linear(64, 2))


class Broken(Memorising):
    def __call__(self, seed):
        raise MemoryError("no room")


@pytest.fixture
def candidates():
    """Pictures of noise with labels that have nothing to do with them: whatever is known of one was memorised."""
    rng = np.random.default_rng(0)
    return Candidates(
        images=rng.integers(0, 256, (N, 8, 8, 3)).astype(np.uint8),
        labels=rng.integers(0, 2, N),
        extra_images=np.zeros((0, 8, 8, 3), dtype=np.uint8),
        extra_labels=np.zeros(0, dtype=np.int64),
        normalisation=HALF,
        build=Memorising(),
    )


def attacked(candidates, member):
    """Train a target on the members, shadow models on halves, and attack."""
    shadow_logits, shadow_member = train_shadows(candidates, config=CONFIG, seed=0)
    torch.manual_seed(1)
    target = Memorising()(0)
    x, y = to_tensor(candidates.images, HALF), torch.from_numpy(candidates.labels)
    optimiser = torch.optim.AdamW(target.parameters(), 1e-2)
    rows = torch.from_numpy(np.flatnonzero(member))
    for _ in range(60 if len(rows) else 0):
        optimiser.zero_grad()
        nn.functional.cross_entropy(target(x[rows]), y[rows]).backward()
        optimiser.step()
    return MembershipInput(
        logits=target(x).detach().numpy(),
        labels=candidates.labels,
        member=np.arange(N) < N // 2,
        shadow_logits=shadow_logits,
        shadow_member=shadow_member,
        seed=0,
    )


def test_a_target_that_learned_by_heart_is_found_and_one_that_never_saw_the_data_is_not(candidates):
    learned = {r.attack: r for r in attack_membership(attacked(candidates, np.arange(N) < N // 2))}
    innocent = {r.attack: r for r in attack_membership(attacked(candidates, np.zeros(N, dtype=bool)))}
    for attack in ("loss", "lira_lite"):
        assert learned[attack].auc > 0.9
        assert innocent[attack].auc_low < 0.5 < innocent[attack].auc_high


def test_every_candidate_is_in_exactly_half_of_the_models_and_the_seed_decides_which():
    members = shadow_members(100, config=CONFIG, seed=0)
    assert (members.sum(axis=0) == CONFIG.models // 2).all()
    assert 30 < members[0].sum() < 70
    np.testing.assert_array_equal(members, shadow_members(100, config=CONFIG, seed=0))
    assert (members != shadow_members(100, config=CONFIG, seed=1)).any()


def test_shadow_models_are_decided_by_the_seed_in_any_order_and_leave_the_process_alone(candidates):
    before = torch.get_rng_state()
    logits, members = train_shadows(candidates, config=CONFIG, seed=0)
    assert torch.equal(torch.get_rng_state(), before)

    def backwards(work, jobs):
        return [work(job) for job in jobs[::-1]][::-1]

    again, same = train_shadows(candidates, config=CONFIG, seed=0, run=backwards)
    np.testing.assert_array_equal(logits, again)
    np.testing.assert_array_equal(members, same)
    assert logits.shape == (4, N, 2)


def test_models_that_are_lost_are_left_out_with_their_members(candidates):
    six = dataclasses.replace(CONFIG, models=6, min_steps=2)

    def losing(work, jobs):
        return [job.lost("WorkerCrashedError") if job.number in {0, 3} else work(job) for job in jobs]

    logits, members = train_shadows(candidates, config=six, seed=0, run=losing)
    assert len(logits) == 4
    np.testing.assert_array_equal(members, shadow_members(N, config=six, seed=0)[[1, 2, 4, 5]])


def test_when_too_few_models_remain_the_reason_is_told(candidates):
    with pytest.raises(DataError, match="0 of 4 shadow models came through: MemoryError: no room"):
        train_shadows(dataclasses.replace(candidates, build=Broken()), config=CONFIG, seed=0)


def test_networks_of_the_published_kind_come_from_a_seed():
    from orchestrator.evaluation.shadows import SameNetworks

    network = NetworkConfig(split_index=5, head="linear")
    same = SameNetworks(network=network, task="loop", n_outputs=2, image_size=16)
    x = torch.rand(2, 3, 16, 16)
    assert same(0)(x).shape == (2, 2)
    assert torch.equal(same(0)(x), same(0)(x))
    assert not torch.equal(same(0)(x), same(1)(x))


def test_networks_of_bounded_tasks_learn_and_answer_under_noise_as_their_targets_do():
    from orchestrator.evaluation.shadows import SameNetworks

    network = BoundedNetworkConfig.of(NetworkConfig(split_index=5), ChannelConfig(dimensions=4, noise=0.5))
    built = SameNetworks(network=network, task="loop", n_outputs=2, image_size=16)(0).eval()
    s = torch.ones(4000, 4, 1, 1)
    noise = built[2](s) - s
    assert float(noise.std()) == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(noise, built[2](s) - s)
    assert built(torch.rand(2, 3, 16, 16)).shape == (2, 2)


@pytest.mark.parametrize("wrong", [{"models": 2}, {"models": 5}, {"epochs": 0}])
def test_settings_that_train_nothing_are_refused(wrong):
    with pytest.raises(ConfigError):
        ShadowConfig(**wrong)
