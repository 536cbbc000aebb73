"""How much work goes into attacking a feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, Literal

from orchestrator.errors import ConfigError
from orchestrator.evaluation.attacks.adapter import AdapterAttack
from orchestrator.evaluation.attacks.base import Attack
from orchestrator.evaluation.attacks.cnn import CnnAttack
from orchestrator.evaluation.attacks.decensoring import DecensoringAttack
from orchestrator.evaluation.attacks.few_shot import FewShotAttack
from orchestrator.evaluation.attacks.kernel import NearestAttack, SvmAttack
from orchestrator.evaluation.attacks.linear import LinearAttack
from orchestrator.evaluation.attacks.mlp import MlpAttack
from tasks.registry import look_up

AttackerData = Literal["attacker", "attacker+train"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackBudget:
    """Which attackers are trained, how often, and on which rows."""

    attacks: tuple[Attack, ...]
    """On every released feature."""
    collusion: tuple[Attack, ...] = ()
    """On every two released features together; none: tenants are not taken to collude."""
    seeds: int = 3
    attacker_data: AttackerData = "attacker"
    """attacker: rows that the defence never saw; attacker+train: those and the defender's training rows."""
    validation_fraction: float = 0.2
    """Of the attacker subset, set apart for the attackers' own choices."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.attacks:
            raise ConfigError("a budget needs at least one attack, got none")
        for attacks in (self.attacks, self.collusion):
            names = [attack.name for attack in attacks]
            if len(set(names)) != len(names):
                raise ConfigError(f"the attacks of a budget need distinct names, got: {', '.join(names)}")
        if self.seeds < 1:
            raise ConfigError(f"an attack budget needs at least one seed, got {self.seeds}")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        if self.attacker_data not in ("attacker", "attacker+train"):
            raise ConfigError(f"attacker_data is attacker or attacker+train, got {self.attacker_data!r}")

    @classmethod
    def preset(cls, name: str, *, seeds: int | None = None) -> AttackBudget:
        """The one of `BUDGETS`, with another number of seeds if one is given. Raises `UnknownNameError`."""
        budget = look_up(BUDGETS, "attack budget", name)
        return budget if seeds is None else replace(budget, seeds=seeds)

    @property
    def subsets(self) -> tuple[str, ...]:
        """The subsets whose labels the attacker knows."""
        return ("attacker", "train") if self.attacker_data == "attacker+train" else ("attacker",)

    @property
    def needs_images(self) -> bool:
        """Whether an attack trains on images that the attacker owns."""
        return any(isinstance(attack, DecensoringAttack) for attack in (*self.attacks, *self.collusion))

    def with_backbone(self, backbone: str, split_index: int) -> AttackBudget:
        """Also train the rest of that backbone from scratch, as the paper's tenant would."""
        attack = CnnAttack(name="cnn_backbone", backbone=backbone, split_index=split_index)
        return replace(self, attacks=(*self.attacks, attack))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, the attacks' settings included."""
        return {
            "attacks": [_settings(attack) for attack in self.attacks],
            "collusion": [_settings(attack) for attack in self.collusion],
            "seeds": self.seeds,
            "attacker_data": self.attacker_data,
            "validation_fraction": self.validation_fraction,
            "device": self.device,
        }


def _settings(attack: Attack) -> dict[str, Any]:
    settings: dict[str, Any] = asdict(attack) if is_dataclass(attack) else {}
    return {"name": attack.name, **settings}


BUDGETS: Mapping[str, AttackBudget] = {
    "quick": AttackBudget(attacks=(LinearAttack(), CnnAttack(epochs=6, min_steps=300)), seeds=1),
    "full": AttackBudget(attacks=(LinearAttack(), CnnAttack()), seeds=3, attacker_data="attacker+train"),
    "suite": AttackBudget(
        attacks=(
            LinearAttack(),
            MlpAttack(),
            CnnAttack(),
            AdapterAttack(),
            DecensoringAttack(),
            SvmAttack(),
            NearestAttack(),
            FewShotAttack(labels=50),
            FewShotAttack(labels=500),
        ),
        collusion=(LinearAttack(), MlpAttack(), CnnAttack()),
        seeds=3,
        attacker_data="attacker+train",
    ),
}
"""quick: a first look, which licenses no claim; full: linear and convolutional attackers, three times each;
suite: every kind of attacker, and tenants that collude, which takes hours."""
