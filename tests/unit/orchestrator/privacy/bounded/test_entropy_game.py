"""The entropy game: adversaries that learn, restarts, and a target that leaves the task its due."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.privacy.bounded import entropy_game
from orchestrator.privacy.bounded.channel import ChannelConfig, power_normalise
from orchestrator.privacy.bounded.entropy_game import ADVERSARIES, EntropyGame, shares_given

CHANNEL = ChannelConfig(dimensions=4, noise=0.5)
N = 256
RNG = np.random.default_rng(0)
OWN, SECRET = RNG.integers(0, 2, N), RNG.integers(0, 3, N)


def game(**changes) -> EntropyGame:
    given = {"own_y": OWN, "secret_y": SECRET, "n_secrets": 3, "seed": 0, "device": torch.device("cpu"), **changes}
    return EntropyGame(CHANNEL, **given)


def sent(labels: np.ndarray) -> torch.Tensor:
    """A feature that is nothing but these labels."""
    corners = torch.tensor([[1.0, 1, 1, 1], [-1, -1, 1, 1], [1, -1, -1, 1]])
    return power_normalise(corners[labels])[:, :, None, None]


def played(of: EntropyGame, s: torch.Tensor, steps: int, start: int = 0) -> torch.Tensor:
    ids = np.arange(N)
    for step in range(start, start + steps):
        nats = of(s, ids, step)
    return nats.detach()


def test_adversaries_learn_to_read_what_is_there_and_find_nothing_where_nothing_is():
    assert played(game(), sent(SECRET), 60).mean() > 0.5
    assert played(game(), sent(OWN), 60).mean() < 0.1, "the task's own label is its due"


def test_what_the_task_s_label_tells_of_the_secret_is_no_loss():
    """The secret is a function of the task's label: to tell it is what the tenant paid for."""
    assert played(game(own_y=SECRET), sent(SECRET), 150).mean() < 0.2


def test_the_gradient_takes_the_secret_out_of_the_feature():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        v = (sent(SECRET).flatten(1) + 0.3 * torch.randn(N, 4)).requires_grad_()
    optimiser, playing = torch.optim.Adam([v], 0.05), game()
    first = last = 0.0
    for step in range(150):
        nats = playing(power_normalise(v)[:, :, None, None], np.arange(N), step).mean()
        optimiser.zero_grad()
        nats.backward()
        optimiser.step()
        first = nats.item() if step == 20 else first
        last = nats.item()
    fresh = played(game(seed=1), power_normalise(v.detach())[:, :, None, None], 60).mean().item()
    untouched = played(game(seed=1), sent(SECRET), 60).mean().item()
    assert last < first
    assert fresh < 0.6 * untouched, "adversaries that begin afterwards read less too"


def test_the_module_s_gradient_is_of_its_feature_alone_and_adversaries_get_none_of_it():
    playing, s = game(), sent(SECRET).requires_grad_()
    nats = playing(s, np.arange(N), 0)
    assert nats.shape == (N,)
    (gradient,) = torch.autograd.grad(nats.sum(), s)
    assert gradient.abs().sum() > 0
    assert s.grad is None, "their own steps were on a copy"


def test_one_adversary_after_the_other_begins_anew(monkeypatch):
    monkeypatch.setattr(entropy_game, "RESTART", 3)
    playing, begun = game(), []
    real = EntropyGame._new
    monkeypatch.setattr(
        EntropyGame, "_new", lambda self, name, step: begun.append((name, step)) or real(self, name, step)
    )
    played(playing, sent(SECRET), 10)
    names = list(ADVERSARIES)
    assert begun == [(names[1], 3), (names[2], 6), (names[0], 9)]


def test_it_goes_on_from_its_state_to_the_same_numbers(monkeypatch):
    monkeypatch.setattr(entropy_game, "RESTART", 3)
    straight, resumed = game(), game()
    played(straight, sent(SECRET), 5)
    resumed.load_state_dict(straight.state_dict())
    assert torch.equal(played(straight, sent(SECRET), 3, start=5), played(resumed, sent(SECRET), 3, start=5))


def test_the_process_keeps_its_own_randomness():
    before = torch.get_rng_state()
    played(game(), sent(SECRET), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_target_is_what_each_label_tells_and_the_average_where_a_label_does_not_occur():
    given = shares_given(np.array([0, 0, 2, 2]), np.array([0, 1, 1, 1]), 3)
    expected = torch.tensor([[0.5, 0.5, 0], [0.25, 0.75, 0], [0, 1, 0]])
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cells", [1, 4])
def test_features_of_several_cells_are_read_as_a_whole(cells):
    side = 2 if cells == 4 else 1
    channel = ChannelConfig(dimensions=4, noise=0.5, cells=cells)
    playing = EntropyGame(channel, own_y=OWN, secret_y=SECRET, n_secrets=3, seed=0, device=torch.device("cpu"))
    assert playing(sent(SECRET).expand(N, 4, side, side), np.arange(N), 0).shape == (N,)
