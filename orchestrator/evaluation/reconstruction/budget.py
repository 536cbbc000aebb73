"""How much work goes into getting images back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.evaluation.budget import AttackerData
from orchestrator.evaluation.reconstruction.base import Reconstructor
from orchestrator.evaluation.reconstruction.baselines import Lookup
from orchestrator.evaluation.reconstruction.inversion import OptimisationInversion
from orchestrator.evaluation.reconstruction.judge import JudgeConfig
from orchestrator.evaluation.reconstruction.trained import TrainedDecoder
from tasks.registry import look_up


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionBudget:
    """Which attackers try, how often, and on which rows."""

    attacks: tuple[Reconstructor, ...]
    seeds: int = 3
    attacker_data: AttackerData = "attacker"
    """attacker: rows that the defence never saw; attacker+train: those and the defender's training rows."""
    validation_fraction: float = 0.2
    """Of the attacker subset, set apart for the attackers' own choices."""
    max_pairs: int = 20_000
    """Of features and images that an attacker trains on."""
    max_test: int = 2_000
    """Test rows that are measured."""
    judge: JudgeConfig = JudgeConfig()
    device: str = "cpu"

    def __post_init__(self) -> None:
        names = [attack.name for attack in self.attacks]
        if not names or len(set(names)) != len(names):
            raise ConfigError(
                f"a budget needs at least one attack and distinct names, got: {', '.join(names) or 'none'}"
            )
        if self.seeds < 1:
            raise ConfigError(f"a reconstruction budget needs at least one seed, got {self.seeds}")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        if min(self.max_pairs, self.max_test) < 2:
            raise ConfigError(f"max_pairs and max_test must be at least 2, got {self.max_pairs} and {self.max_test}")
        if self.attacker_data not in ("attacker", "attacker+train"):
            raise ConfigError(f"attacker_data is attacker or attacker+train, got {self.attacker_data!r}")

    @classmethod
    def preset(cls, name: str, *, seeds: int | None = None) -> ReconstructionBudget:
        """The one of `RECONSTRUCTION_BUDGETS`, with another number of seeds if one is given."""
        budget = look_up(RECONSTRUCTION_BUDGETS, "reconstruction budget", name)
        return budget if seeds is None else replace(budget, seeds=seeds)

    @property
    def subsets(self) -> tuple[str, ...]:
        """The subsets whose images the attacker has."""
        return ("attacker", "train") if self.attacker_data == "attacker+train" else ("attacker",)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, the attacks' settings included."""
        attacks = [{"name": a.name, **(asdict(a) if is_dataclass(a) else {})} for a in self.attacks]
        names = ("seeds", "attacker_data", "validation_fraction", "max_pairs", "max_test", "device")
        return {"attacks": attacks, "judge": asdict(self.judge), **{name: getattr(self, name) for name in names}}


_FIGURE_8B = TrainedDecoder(name="decoder_8b", kind="transposed", loss="mse", standardise=False)

RECONSTRUCTION_BUDGETS: Mapping[str, ReconstructionBudget] = {
    "quick": ReconstructionBudget(
        attacks=(
            TrainedDecoder(epochs=10, min_steps=400, width=64),
            Lookup(),
            OptimisationInversion(images=8, iterations=150),
        ),
        seeds=1,
        max_pairs=3_000,
        max_test=500,
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
    ),
}
"""quick: a first look, in minutes, which licenses no claim; full: what a claim about privacy needs."""
