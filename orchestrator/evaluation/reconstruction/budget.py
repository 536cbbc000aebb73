"""How much work goes into getting images back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.evaluation.reconstruction.base import Reconstructor
from orchestrator.evaluation.reconstruction.baselines import Lookup
from orchestrator.evaluation.reconstruction.inversion import OptimisationInversion
from orchestrator.evaluation.reconstruction.judge import JudgeConfig
from orchestrator.evaluation.reconstruction.trained import TrainedDecoder
from orchestrator.evaluation.rows import RowBudget, check_names, only_named
from tasks.registry import look_up


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionBudget(RowBudget):
    """Which attackers try to get images back, how often, and on which rows."""

    attacks: tuple[Reconstructor, ...]
    max_test: int = 2_000
    """Test rows that are measured."""
    judge: JudgeConfig | None = JudgeConfig()
    """None: nobody looks at what the images show, and nothing may be claimed (R3)."""
    from_answer: tuple[str, ...] = ()
    """Attacks that also learn from the head's answer alone, so that what the feature adds to it can be told."""

    def __post_init__(self) -> None:
        RowBudget.__post_init__(self)  # super() does not work in a dataclass with slots
        if not self.attacks:
            raise ConfigError("a reconstruction budget needs at least one attack, got none")
        check_names("attacks", [attack.name for attack in self.attacks])
        only_named(self.attacks, self.from_answer)
        if self.max_test < 2:
            raise ConfigError(f"max_test must be at least 2, got {self.max_test}")

    @classmethod
    def preset(cls, name: str, *, seeds: int | None = None) -> ReconstructionBudget:
        """The one of `RECONSTRUCTION_BUDGETS`, with another number of seeds if one is given."""
        budget = look_up(RECONSTRUCTION_BUDGETS, "reconstruction budget", name)
        return budget if seeds is None else replace(budget, seeds=seeds)

    def only(self, names: Sequence[str]) -> ReconstructionBudget:
        """With these attacks alone, in the budget's order. Raises `UnknownNameError`."""
        attacks = only_named(self.attacks, names)
        return replace(self, attacks=attacks, from_answer=tuple(name for name in self.from_answer if name in names))

    @property
    def needs_weights(self) -> bool:
        """Whether an attack holds the networks that the features come from."""
        return any(isinstance(attack, OptimisationInversion) for attack in self.attacks)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, the attacks' settings included."""
        attacks = [{"name": a.name, **(asdict(a) if is_dataclass(a) else {})} for a in self.attacks]
        names = ("seeds", "attacker_data", "validation_fraction", "max_rows", "max_test", "device", "from_answer")
        judge = None if self.judge is None else asdict(self.judge)
        return {"attacks": attacks, "judge": judge, **{name: getattr(self, name) for name in names}}


_FIGURE_8B = TrainedDecoder(name="decoder_8b", kind="transposed", loss="mse", standardise=False)

RECONSTRUCTION_BUDGETS: Mapping[str, ReconstructionBudget] = {
    "quick": ReconstructionBudget(
        attacks=(TrainedDecoder(epochs=5, min_steps=250, width=64), Lookup()),
        seeds=1,
        max_rows=3_000,
        max_test=500,
        judge=None,
    ),
    "full": ReconstructionBudget(
        attacks=(
            _FIGURE_8B,
            TrainedDecoder(),
            TrainedDecoder(name="decoder_l1", loss="l1"),
            TrainedDecoder(name="decoder_staged", kind="staged"),
            Lookup(),
            OptimisationInversion(),
        ),
        attacker_data="attacker+train",
        from_answer=("decoder",),
    ),
}
"""quick: a first look, in minutes, which licenses no claim; full: what a claim about privacy needs."""
