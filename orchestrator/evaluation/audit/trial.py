"""One audited training: the code that trains, with its plan, sampler, private step and accountant, on planted examples.

Faults are planted here, in a plan that is made already. No setting of a training leads to one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from orchestrator.encoder_training import EncoderResult, EncoderTraining
from orchestrator.evaluation.audit.bound import Scores
from orchestrator.evaluation.audit.canary import (
    N_TRAIN,
    PARTS,
    SPEC,
    TASK,
    Planted,
    flipping,
    worst_case,
)
from orchestrator.inputs import CachedInputs
from orchestrator.module_training import ModuleTraining
from orchestrator.privacy.dissimilarity import DissimilarityConfig
from orchestrator.privacy.dp import DpConfig, DpMode
from orchestrator.privacy.guarantee import PAPER, Guarantee, guarantee_for
from orchestrator.privacy.plan import DpPlan
from orchestrator.sampling import derive_seed
from orchestrator.updates import make_plan, poisson_schedule

_UNREACHED: Final = 1e12
"""A clipping norm that no gradient of an audit comes near."""
_TWO_STAGES: Final = "surrogate_dp_modules"
_LOUD: Final[Mapping[str, tuple[str, ...]]] = {_TWO_STAGES: ("encoder", "modules"), "two_budget": ("encoder", "heads")}
"""Mode to the parts of the release that the canary moves as far as a clip allows; the encoder where none is given."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A way to break a training under a guarantee that goes on being claimed."""

    name: str
    because: str
    """Why more is lost than is claimed, in words."""
    plant: Callable[[DpPlan], DpPlan]


def _without_noise(plan: DpPlan) -> DpPlan:
    return dataclasses.replace(plan, noise_multiplier=0.0)


def _without_clip(plan: DpPlan) -> DpPlan:
    """The noise stays what it was: its standard deviation is the noise multiplier times the clipping norm."""
    return dataclasses.replace(
        plan,
        max_grad_norm=_UNREACHED,
        noise_multiplier=plan.noise_multiplier * plan.max_grad_norm / _UNREACHED,
        head_max_grad_norm=None if plan.head_max_grad_norm is None else _UNREACHED,
    )


def _as_it_is(plan: DpPlan) -> DpPlan:
    return plan


NO_NOISE: Final = Fault(name="noise off", because="the noise is off", plant=_without_noise)
NO_CLIP: Final = Fault(name="clip removed", because="the clip is removed", plant=_without_clip)
OPEN_HEAD: Final = Fault(name="counter-example", because="the head learns without noise", plant=_as_it_is)
"""Nothing is planted: the mode itself is the fault."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A mode, what is planted in it, and the mechanism that is claimed."""

    dp: DpConfig
    planted: Planted
    plans: tuple[DpPlan, ...] = field(repr=False)
    """Of the trainings one after another, as they are claimed: one, or that of the encoder and that of the modules."""
    fault: Fault | None = None

    @classmethod
    def make(cls, mode: DpMode, *, epsilon: float, fault: Fault | None = None) -> Case:
        """Finds the noise as a run does. Takes up to seconds."""
        dp = DpConfig(dp_mode=mode, epsilon=epsilon, public_data="digits" if mode == "public_head" else None)
        planted = flipping() if mode == PAPER else worst_case(_LOUD.get(mode, ("encoder",)))
        size = {"batch_size": planted.config.batch_size, "epochs": planted.config.epochs}
        alike = (poisson_schedule(N_TRAIN, **size),) if mode == _TWO_STAGES else ()
        plan = make_plan(dp, n_train=N_TRAIN, **size, secret=0, alike=alike)
        assert plan is not None
        return cls(dp=dp, planted=planted, plans=(plan,) * (1 + len(alike)), fault=fault)

    @property
    def name(self) -> str:
        """For progress lines."""
        return f"{self.dp.dp_mode}, {self.fault.name}" if self.fault else self.dp.dp_mode

    def guarantee(self) -> Guarantee:
        """What a run of this mode would print, from what the accountant of one really counts."""
        accountant = self.plans[0].accountant()
        for plan, (_, result) in zip(self.plans, self._train(self.plans, with_canary=False), strict=True):
            counted = plan.accountant()
            counted.load_state_dict(result.accountant or {})
            for sigma, rate, steps in counted.history:
                for _ in range(steps):
                    accountant.step(noise_multiplier=sigma, sample_rate=rate)
        return guarantee_for(self.dp, accountant=accountant, n_train=N_TRAIN)

    def score(self, *, with_canary: bool, secret: int) -> float:
        """One training with its own noise and batches, and how far its release went where the canary drives it."""
        fault = self.fault or OPEN_HEAD
        plans = [
            dataclasses.replace(fault.plant(plan), secret_seed=derive_seed(secret, stage))
            for stage, plan in enumerate(self.plans)
        ]
        released: dict[str, Tensor] = {}
        for part, result in self._train(plans, with_canary=with_canary):
            released |= _weights(result, of=part)
        return float(sum((released[part].double() * d).sum() for part, d in self.planted.directions.items()))

    def _train(self, plans: Sequence[DpPlan], *, with_canary: bool) -> list[tuple[str, EncoderResult]]:
        """Every stage, with the first part of the network that it trains."""
        planted, inputs = self.planted, self.planted.inputs(with_canary=with_canary)
        common: dict[str, Any] = {
            "config": planted.config,
            "network": planted.networks,
            "image_size": 0,
            "specs": {TASK: SPEC},
            "labels": planted.labels,
            "seed": 0,
        }
        public = planted.public if self.dp.dp_mode == "public_head" else None
        training = EncoderTraining(plan=plans[0], inputs=inputs, public=public, **common)
        results = [("encoder", _run(training))]
        for plan in plans[1:]:
            with torch.no_grad():
                features = training.encoder(inputs.x).numpy().astype(np.float16)
            rows = {subset: np.arange(inputs.size(subset)) for subset in ("train", "validation", "test")}
            training = ModuleTraining(
                plan=plan,
                inputs=CachedInputs(features, None, rows, seed=0),
                dissimilarity=DissimilarityConfig(omega=0.0),
                fixed=None,
                feature_shape=(1, 1, 1),  # of no consequence: nothing is kept apart, and no channel bounds it
                **common,
            )
            results.append(("modules", _run(training)))
        return results


def _run(training: EncoderTraining) -> EncoderResult:
    while training.step < training.total_steps:
        training.train_step()
    return training.result()


def _weights(result: EncoderResult, *, of: str) -> dict[str, Tensor]:
    """What is released, by part, from the part ``of`` on."""
    states = {"encoder": result.encoder, "modules": result.modules.get(TASK), "heads": result.heads.get(TASK)}
    return {part: state["weight"] for part in PARTS[PARTS.index(of) :] if (state := states[part])}


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Some trainings of one case: what a process works on at a time."""

    case: Case
    with_canary: bool
    secrets: tuple[int, ...] = field(repr=False)


def run_trials(trials: Trials) -> Scores:
    """A score for each secret."""
    return np.array([trials.case.score(with_canary=trials.with_canary, secret=s) for s in trials.secrets])
