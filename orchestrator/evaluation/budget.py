"""How much work goes into attacking a feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.evaluation.attacks.adapter import AdapterAttack
from orchestrator.evaluation.attacks.base import Attack
from orchestrator.evaluation.attacks.cnn import CnnAttack
from orchestrator.evaluation.attacks.decensoring import DecensoringAttack
from orchestrator.evaluation.attacks.few_shot import FewShotAttack
from orchestrator.evaluation.attacks.kernel import NearestAttack, SvmAttack
from orchestrator.evaluation.attacks.linear import LinearAttack
from orchestrator.evaluation.attacks.mlp import MlpAttack
from orchestrator.evaluation.rows import RowBudget, check_names, only_named
from tasks.registry import look_up


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackBudget(RowBudget):
    """Which attackers of labels are trained, how often, and on which rows."""

    attacks: tuple[Attack, ...]
    """On every released feature."""
    collusion: tuple[Attack, ...] = ()
    """On every two released features together; none: tenants are not taken to collude."""

    def __post_init__(self) -> None:
        RowBudget.__post_init__(self)  # super() does not work in a dataclass with slots
        if not self.attacks:
            raise ConfigError("a budget needs at least one attack, got none")
        for kind in ("attacks", "collusion"):
            check_names(kind, [attack.name for attack in getattr(self, kind)])

    @classmethod
    def preset(cls, name: str, *, seeds: int | None = None) -> AttackBudget:
        """The one of `BUDGETS`, with another number of seeds if one is given. Raises `UnknownNameError`."""
        budget = look_up(BUDGETS, "attack budget", name)
        return budget if seeds is None else replace(budget, seeds=seeds)

    def only(self, names: Sequence[str]) -> AttackBudget:
        """With these attacks alone, in the budget's order. Raises `UnknownNameError`."""
        kept = only_named(self.attacks, names)
        return replace(self, attacks=kept, collusion=tuple(a for a in self.collusion if a.name in names))

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
            "max_rows": self.max_rows,
            "device": self.device,
        }


def _settings(attack: Attack) -> dict[str, Any]:
    settings: dict[str, Any] = asdict(attack) if is_dataclass(attack) else {}
    return {"name": attack.name, **settings}


BUDGETS: Mapping[str, AttackBudget] = {
    "quick": AttackBudget(
        attacks=(
            LinearAttack(),
            MlpAttack(epochs=5, min_steps=200),
            CnnAttack(epochs=6, min_steps=300, width=32),
            NearestAttack(),
            FewShotAttack(labels=50),
        ),
        seeds=1,
        max_rows=3_000,
    ),
    "full": AttackBudget(
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
        attacker_data="attacker+train",
    ),
}
"""quick: a first look, which licenses no claim; full: every kind of attacker, three times each, on more rows, and
tenants that collude: what a claim needs."""
