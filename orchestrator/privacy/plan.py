"""One private training, decided before its first step: noise, sampling, and what will have been spent at the end."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from orchestrator.errors import ConfigError, PrivacyRefusal
from orchestrator.optimisation import restore, snapshot
from orchestrator.privacy.accounting import Accountant, History, noise_multiplier
from orchestrator.privacy.clipping import PartClip
from orchestrator.privacy.dp import DpBudget, PrivateStep, refuse_unsafe
from orchestrator.sampling import BatchSampler, PoissonBatches, derive_seed
from orchestrator.shard import WHOLE, Shard

Charge: TypeAlias = Callable[[int], None]
"""Called with the number of a private step, counted from 1, before the step is taken. Raises if it may not be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DpPlan:
    """The DP-SGD mechanism of one training: Poisson sampling at rate q, clip C, noise sigma * C, so many steps."""

    mode: str
    epsilon: float
    """What the steps will have cost, by the accountant."""
    delta: float
    noise_multiplier: float
    """sigma: the noise's standard deviation in units of the clipping norm."""
    max_grad_norm: float
    """C: the largest L2 norm of one example's gradient over all covered parameters."""
    sample_rate: float
    """q: the probability that an example enters a batch."""
    steps: int
    accountant_kind: str
    n_train: int
    secret_seed: int = field(repr=False)
    """Of the noise and of the sampling. Whoever knows it can take the noise off again, so it is never printed or saved
    with the run's settings."""
    reproducible: bool
    """Whether the user fixed the seed."""
    head_budget: float | None = None
    """With two_budget: the head's share of 1 / sigma^2; None clips and noises all weights as one."""
    head_max_grad_norm: float | None = None
    """With two_budget: the head's own clipping norm."""
    before: History = ()
    """What was spent on the same images before, by trainings that this one builds on: it counts in what is printed."""
    charge: Charge | None = field(default=None, repr=False, compare=False)
    """Where every step is written down before it is taken; None keeps no ledger."""

    @classmethod
    def make(
        cls,
        dp: DpBudget,
        *,
        n_train: int,
        sample_rate: float,
        steps: int,
        secret: int | None = None,
        before: History = (),
        alike: tuple[tuple[float, int], ...] = (),
        mode: str | None = None,
    ) -> DpPlan:
        """Find the noise for which ``steps`` steps cost ``dp.epsilon``, composed as `noise_multiplier` says.

        ``secret`` is the seed of its noise and batches: that of an interrupted training that is to be gone on with, and
        never that of another training. By default the user's fixed one, or a fresh one.
        """
        if dp.epsilon is None:
            raise ConfigError("a private training needs an epsilon")
        delta = dp.delta_for(n_train)
        sigma = noise_multiplier(
            epsilon=dp.epsilon,
            delta=delta,
            sample_rate=sample_rate,
            steps=steps,
            accountant=dp.accountant,
            before=before,
            alike=alike,
        )
        head_budget, head_max_grad_norm = dp.head_apart or (None, None)
        return cls(
            mode=mode or dp.mode,
            head_budget=head_budget,
            head_max_grad_norm=head_max_grad_norm,
            epsilon=dp.epsilon,
            delta=delta,
            noise_multiplier=sigma,
            max_grad_norm=dp.max_grad_norm,
            sample_rate=sample_rate,
            steps=steps,
            accountant_kind=dp.accountant,
            n_train=n_train,
            secret_seed=next(seed for seed in (secret, dp.noise_seed, secrets.randbits(63)) if seed is not None),
            reproducible=dp.noise_seed is not None,
        )

    @property
    def sampling_seed(self) -> int:
        """Of the Poisson batches."""
        return derive_seed(self.secret_seed, "sampling")

    def accountant(self) -> Accountant:
        """A fresh accountant of this plan's kind."""
        return Accountant(self.accountant_kind)

    def private_step(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accountant: Accountant,
        sampler: BatchSampler,
        head_path: nn.Module | None = None,
        shard: Shard = WHOLE,
    ) -> PrivateStep:
        """The update that this plan describes, for the batches of ``sampler``.

        ``head_path`` is what follows the network: it is checked, not noised. Raises `PrivacyRefusal`.
        """
        self.refuse_other_sampling(sampler)
        if head_path is not None:
            refuse_unsafe(head_path)
        device = next(network.parameters()).device
        generator = torch.Generator(device=device)
        return SeededPrivateStep(
            network,
            optimizer,
            secret_seed=derive_seed(self.secret_seed, "noise"),
            charge=self.charge if shard.first else None,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=self.sample_rate * self.n_train,
            sample_rate=self.sample_rate,
            noise_generator=generator,
            accountant=accountant,
            shard=shard,
            parts=self.parts(),
        )

    def parts(self) -> dict[str, PartClip] | None:
        """Beginning of a parameter's name to how that part of the network is clipped and noised; None: all as one.

        Two parts with noise sigma_1 and sigma_2 cost what one would with 1/sigma^2 = 1/sigma_1^2 + 1/sigma_2^2.
        """
        if self.head_budget is None or self.head_max_grad_norm is None:
            return None
        rest, head = (self.noise_multiplier / share**0.5 for share in (1 - self.head_budget, self.head_budget))
        return {
            "": PartClip(max_grad_norm=self.max_grad_norm, noise_multiplier=rest),
            HEADS: PartClip(max_grad_norm=self.head_max_grad_norm, noise_multiplier=head),
        }

    def refuse_other_sampling(self, sampler: BatchSampler) -> None:
        """Raise `PrivacyRefusal` unless every example enters a batch by itself, with the accounted probability."""
        if not isinstance(sampler, PoissonBatches):
            raise PrivacyRefusal(
                f"the accountant assumes that every image enters a batch by itself, with probability "
                f"{self.sample_rate:g}; {type(sampler).__name__} does not draw like that: use PoissonBatches"
            )
        if (sampler.n, sampler.sample_rate) != (self.n_train, self.sample_rate):
            raise PrivacyRefusal(
                f"the sampler draws from {sampler.n} images with probability {sampler.sample_rate:g}, but "
                f"{self.n_train} images with probability {self.sample_rate:g} are accounted: make both from one plan"
            )


HEADS: Final = "heads."
"""What the parameters of heads are called in a `orchestrator.network.LogitNetwork`."""


class SeededPrivateStep(PrivateStep):
    """A `PrivateStep` whose noise is a function of (secret seed, step).

    A training that goes on from a checkpoint draws the noise of its next step, and not that of its first one again:
    noise used twice on different gradients would cancel in their difference.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        secret_seed: int,
        noise_generator: torch.Generator,
        charge: Charge | None = None,
        **mechanism: Any,
    ) -> None:
        super().__init__(module, optimizer, noise_generator=noise_generator, **mechanism)
        self._secret_seed, self._generator, self._taken = secret_seed, noise_generator, 0
        self._charge = charge

    def step(self, outputs: Sequence[Tensor], cut_gradients: Sequence[Tensor]) -> None:
        """One private step with its own noise."""
        self._generator.manual_seed(derive_seed(self._secret_seed, self._taken))
        super().step(outputs, cut_gradients)
        self._taken += 1

    def _account(self) -> None:
        """In the ledger first: what it refuses, or cannot write down, is not done."""
        if self._charge is not None:
            self._charge(self._taken + 1)
        super()._account()

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, and how many steps were taken. The accountant is saved by whoever owns it."""
        return {"optimizer": snapshot(self.optimizer), "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.discard()
        restore(self.optimizer, state["optimizer"])
        self._taken = int(state["taken"])
