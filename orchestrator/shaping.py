"""What the producer asks of a bounded feature besides what its tenant does: to tell less of anything else.

Two terms, each a number an image whose mean over the batch is added to the tenant's loss, in effect: its gradient is
added to that which the tenant returns. Neither promises anything, and neither is needed for the bound: they make the
same bits go to the task.

rate      what s tells beyond the task's own label, whatever it is (`privacy.bounded.rate_penalty`)
secrets   what adversaries read of attributes that were named (`privacy.bounded.entropy_game`)

Both wait until the task has been learned a little, and then grow to their weight: before, all that a feature tells is
beyond its task, and they would have it tell nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.errors import ConfigError
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.bounded.entropy_game import EntropyGame
from orchestrator.privacy.bounded.rate_penalty import RatePenalty
from orchestrator.sampling import derive_seed
from tasks.spec import TaskSpec

WAIT: Final = 0.2
"""Share of the training before the terms begin, and again until they have their weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Secret:
    """An attribute that no feature is to tell, and its labels. They stay with the producer."""

    labels: NDArray[np.int64] = field(repr=False)
    """(N,) of the training rows."""
    n_classes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapingPlan:
    """Which terms, and how much each weighs."""

    rate_weight: float = 0.0
    """Of a nat of rate."""
    secret_weight: float = 0.0
    """Of a nat that adversaries are above what the task's own label tells."""
    secrets: Mapping[str, Secret] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("rate_weight", "secret_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")

    @property
    def asks(self) -> bool:
        """Whether there is any term at all."""
        return bool(self.words)

    @property
    def words(self) -> str:
        """What is asked, for statements; empty where nothing is."""
        rate = f"rate penalty {self.rate_weight:g}" if self.rate_weight > 0 else ""
        names = ", ".join(sorted(self.secrets)) if self.secret_weight > 0 else ""
        game = f"adversaries on {names}, weight {self.secret_weight:g}" if names else ""
        return "; ".join(part for part in (rate, game) if part)


class Shaping:
    """The terms of one session. Owned by the producer, whose state holds theirs."""

    def __init__(
        self,
        plan: ShapingPlan,
        channel: ChannelConfig,
        *,
        specs: Mapping[str, TaskSpec],
        labels: Mapping[str, NDArray[np.int64]],
        feature_shape: tuple[int, ...],
        total_steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """``labels`` are those of the training rows, by task; ``total_steps`` those of the whole training."""
        self._plan, self._total_steps = plan, total_steps
        # Of a task that answers with a map all images are of one class.
        self._labels = {t: np.zeros(len(y), dtype=np.int64) if specs[t].dense else y for t, y in labels.items()}
        self._rates = {
            task: RatePenalty(channel, feature_shape, 1 if spec.dense else spec.n_outputs)
            for task, spec in specs.items()
            if plan.rate_weight > 0
        }
        self._games = {
            (task, name): EntropyGame(
                channel,
                own_y=self._labels[task],
                secret_y=secret.labels,
                n_secrets=secret.n_classes,
                seed=derive_seed(seed, "game", task, name),
                device=device,
            )
            for task in specs
            for name, secret in plan.secrets.items()
            if plan.secret_weight > 0 and name != task
        }

    def pull(self, s: Mapping[str, Tensor], ids: NDArray[np.int64], *, step: int) -> dict[str, Tensor]:
        """By task, the gradient of its terms' weighted mean over the batch, of the shape of s.

        Each step is to be asked for once: adversaries and running moments learn from it.
        """
        if not len(ids):
            return {}
        return {task: self._of(task, value.detach().requires_grad_(), ids, step) for task, value in s.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on."""
        return {
            "rates": {task: rate.state_dict() for task, rate in self._rates.items()},
            "games": {f"{task}|{name}": game.state_dict() for (task, name), game in self._games.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        for task, rate in self._rates.items():
            rate.load_state_dict(state["rates"][task])
        for (task, name), game in self._games.items():
            game.load_state_dict(state["games"][f"{task}|{name}"])

    def _part(self, step: int) -> float:
        """Of their weight, that the terms have in this step."""
        return min(1.0, max(0.0, (step / self._total_steps - WAIT) / WAIT))

    def _of(self, task: str, s: Tensor, ids: NDArray[np.int64], step: int) -> Tensor:
        y = torch.from_numpy(self._labels[task][ids]).to(s.device)
        cost, part = torch.zeros(len(ids), device=s.device), self._part(step)
        if task in self._rates:
            cost = cost + part * self._plan.rate_weight * self._rates[task](s, y)
        for (of, _), game in self._games.items():
            if of == task:
                cost = cost + part * self._plan.secret_weight * game(s, ids, step)
        if not cost.requires_grad:
            return torch.zeros_like(s)
        (gradient,) = torch.autograd.grad(cost.mean(), s)
        return gradient
