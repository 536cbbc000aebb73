"""How a training draws its batches and updates its weights: plainly, or as its DP plan says."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from orchestrator.network import trainable
from orchestrator.optimisation import OptimiserConfig, PlainUpdate, Update
from orchestrator.privacy.accounting import Accountant
from orchestrator.privacy.dp import DpBudget
from orchestrator.privacy.plan import DpPlan
from orchestrator.sampling import BatchSampler, PoissonBatches, ShuffledBatches, derive_seed
from orchestrator.shard import WHOLE, Shard


def batch_sampler(plan: DpPlan | None, *, n: int, batch_size: int, seed: int) -> BatchSampler:
    """Poisson with DP, shuffled without. The private one's batches are as secret as its noise."""
    if plan is None:
        return ShuffledBatches(n, batch_size=batch_size, seed=derive_seed(seed, "batches"))
    return PoissonBatches(n, batch_size=min(batch_size, n), seed=plan.sampling_seed)


def make_plan(dp: DpBudget, *, n_train: int, batch_size: int, epochs: int, **rest: Any) -> DpPlan | None:
    """The mechanism of a training of so many epochs; None without an epsilon. For the rest see `DpPlan.make`."""
    if dp.epsilon is None:
        return None
    sample_rate, steps = poisson_schedule(n_train, batch_size=batch_size, epochs=epochs)
    return DpPlan.make(dp, n_train=n_train, sample_rate=sample_rate, steps=steps, **rest)


def poisson_schedule(n_train: int, *, batch_size: int, epochs: int) -> tuple[float, int]:
    """(sample rate, steps) of a private training of so many epochs."""
    sampler = PoissonBatches(n_train, batch_size=min(batch_size, n_train), seed=0)
    return sampler.sample_rate, sampler.steps_per_epoch * epochs


def build_update(
    network: nn.Module,
    optimiser: OptimiserConfig,
    *,
    plan: DpPlan | None,
    accountant: Accountant | None,
    sampler: BatchSampler,
    head_path: nn.Module | None = None,
    shard: Shard = WHOLE,
) -> Update:
    """Plain, or per-example clipped and noised where there is a plan, for the batches of ``sampler``.

    ``head_path`` is checked, not changed.
    """
    parameters = optimiser.build(trainable(network)) if trainable(network) else _NoParameters()
    if plan is None:
        return PlainUpdate(network, parameters, shard=shard)
    assert accountant is not None
    return plan.private_step(
        network, parameters, accountant=accountant, sampler=sampler, head_path=head_path, shard=shard
    )


class _NoParameters(torch.optim.Optimizer):
    """Stands where nothing is trained (identity modules on a frozen encoder)."""

    def __init__(self) -> None:
        super().__init__([nn.Parameter(torch.zeros(1), requires_grad=False)], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change nothing."""
