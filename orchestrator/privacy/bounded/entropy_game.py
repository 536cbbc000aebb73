"""The entropy game: a module against an ensemble of adversaries that read a named secret of its feature (SPEC E.5).

    adversary a    min CE(a(z), secret)                       twice for each step of the module, on z detached
    module         min mean_a KL( p(secret | y) || a(z) )     beside what its task asks for

The target is not the uniform distribution but what the task's own label tells, so that the game does not fight the task
where labels are correlated, and nothing is to be gained by telling less. It is no guarantee: adversaries of other kinds
may read what these did not. One of them begins anew every so often, as a single one is led astray for good.

Axes: B examples, K classes of the task, M classes of the secret.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.models.seeding import seeded
from orchestrator.optimisation import OptimiserConfig, restore, snapshot
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.sampling import derive_seed

STEPS: Final = 2
"""Of every adversary, for one of the module."""
RESTART: Final = 200
"""Steps after which the next adversary begins anew."""
RATE: Final = 3e-3
"""Learning rate of the adversaries."""


def _linear(n: int, m: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(n, m))


def _mlp(n: int, m: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(n, 64), nn.ReLU(), nn.Linear(64, m))


def _deep(n: int, m: int) -> nn.Module:
    layers = [nn.Linear(n, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, m)]
    return nn.Sequential(nn.Flatten(), *layers)


ADVERSARIES: Final[Mapping[str, Callable[[int, int], nn.Module]]] = {"linear": _linear, "mlp": _mlp, "deep": _deep}


class EntropyGame:
    """Of one task and one secret. Owned by the producer: neither adversaries nor secrets ever leave it."""

    def __init__(
        self,
        channel: ChannelConfig,
        *,
        own_y: NDArray[np.int64],
        secret_y: NDArray[np.int64],
        n_secrets: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """From the labels of all training rows, (N,) each."""
        self._tau, self._seed, self._device = channel.noise, seed, device
        self._own, self._secret = torch.from_numpy(own_y), torch.from_numpy(secret_y)
        self._given = shares_given(own_y, secret_y, n_secrets)
        self._size, self._n_secrets = channel.dimensions * channel.cells, n_secrets
        self._adversaries = {name: self._new(name, 0) for name in ADVERSARIES}
        self._optimisers = {name: self._optimiser(name) for name in ADVERSARIES}

    def __call__(self, s: Tensor, ids: NDArray[np.int64], step: int) -> Tensor:
        """(B,) nats, with gradients to s alone, after the adversaries have learned from the batch."""
        draws = torch.Generator().manual_seed(derive_seed(self._seed, "noise", step))
        secret = self._secret[torch.from_numpy(ids)].to(s.device)
        self._restart(step)
        for _ in range(STEPS):
            z = self._noisy(s.detach(), draws)
            for name, adversary in self._adversaries.items():
                loss = functional.cross_entropy(adversary(z), secret)
                self._optimisers[name].zero_grad(set_to_none=True)
                loss.backward()
                self._optimisers[name].step()
        target = self._given[self._own[torch.from_numpy(ids)]].to(s.device)
        z = self._noisy(s, draws)
        answers = torch.stack([functional.log_softmax(a(z), dim=1) for a in self._adversaries.values()])
        return functional.kl_div(answers, target.expand_as(answers), reduction="none").sum(2).mean(0)

    def state_dict(self) -> dict[str, Any]:
        """A copy."""
        return {
            name: {
                "adversary": {key: value.clone() for key, value in adversary.state_dict().items()},
                "optimiser": snapshot(self._optimisers[name]),
            }
            for name, adversary in self._adversaries.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, kept in state.items():
            self._adversaries[name].load_state_dict(kept["adversary"])
            restore(self._optimisers[name], kept["optimiser"])

    def _noisy(self, s: Tensor, draws: torch.Generator) -> Tensor:
        return s + self._tau * torch.randn(s.shape, generator=draws).to(s.device)

    def _restart(self, step: int) -> None:
        if step and step % RESTART == 0:
            name = list(ADVERSARIES)[step // RESTART % len(ADVERSARIES)]
            self._adversaries[name] = self._new(name, step)
            self._optimisers[name] = self._optimiser(name)

    def _new(self, name: str, step: int) -> nn.Module:
        with seeded(derive_seed(self._seed, name, step)):
            return ADVERSARIES[name](self._size, self._n_secrets).to(self._device)

    def _optimiser(self, name: str) -> torch.optim.Optimizer:
        return OptimiserConfig(lr=RATE).build(list(self._adversaries[name].parameters()))


def shares_given(own_y: NDArray[np.int64], secret_y: NDArray[np.int64], n_secrets: int) -> Tensor:
    """(K, M) p(secret | y) of the rows; of a class that does not occur, the secret's own shares."""
    counts = np.zeros((int(own_y.max()) + 1, n_secrets))
    np.add.at(counts, (own_y, secret_y), 1)
    counts += 1e-9 * counts.sum(axis=0)
    return torch.from_numpy(counts / counts.sum(axis=1, keepdims=True)).float()
