"""Which rows an attacker learns from, and how often it tries: the same for attackers of every kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import ConfigError
from orchestrator.evaluation.attacks.base import LabelArray
from orchestrator.sampling import derive_seed
from tasks.registry import look_up

AttackerData = Literal["attacker", "attacker+train"]
Number = TypeVar("Number", bound=np.generic)


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=_HasName)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBudget:
    """What budgets of all kinds have in common."""

    seeds: int = 3
    attacker_data: AttackerData = "attacker"
    """attacker: rows that the defence never saw; attacker+train: those and the defender's training rows."""
    validation_fraction: float = 0.2
    """Of the attacker subset, set apart for the attackers' own choices."""
    max_rows: int = 20_000
    """That an attacker learns from; of more, as many are drawn at random, its own first."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"an attack budget needs at least one seed, got {self.seeds}")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        if self.max_rows < 2:
            raise ConfigError(f"max_rows must be at least 2, got {self.max_rows}")
        if self.attacker_data not in ("attacker", "attacker+train"):
            raise ConfigError(f"attacker_data is attacker or attacker+train, got {self.attacker_data!r}")

    @property
    def subsets(self) -> tuple[str, ...]:
        """The subsets that the attacker knows, its own first."""
        return ("attacker", "train") if self.attacker_data == "attacker+train" else ("attacker",)

    def cut(self, sizes: Mapping[str, int], seed: int) -> AttackerRows:
        """Draw the attacker's rows by the seed; ``sizes`` is that of each subset."""
        n = sizes["attacker"]
        order = np.random.default_rng(derive_seed(seed, "attacker validation")).permutation(n)
        cut = max(1, round(self.validation_fraction * n))
        learned = {"attacker": order[cut:][: self.max_rows]}
        for subset in self.subsets[1:]:
            room = self.max_rows - sum(map(len, learned.values()))
            drawn = np.random.default_rng(derive_seed(seed, "rows", subset)).permutation(sizes[subset])
            learned[subset] = drawn[:room]
        return AttackerRows(learned=learned, held_out=order[:cut])


class AttackerRows(NamedTuple):
    """Positions in the subsets."""

    learned: Mapping[str, LabelArray]
    """By subset."""
    held_out: LabelArray
    """Of the attacker's own subset: for its choices, never for the final number."""

    def of(self, by_subset: Mapping[str, NDArray[Number]]) -> NDArray[Number]:
        """The learned rows of something, as one array."""
        return np.concatenate([by_subset[subset][rows] for subset, rows in self.learned.items()])


def only_named(attacks: Sequence[Named], names: Sequence[str]) -> tuple[Named, ...]:
    """Those of these names, in their own order. Raises `UnknownNameError`."""
    known = {attack.name: attack for attack in attacks}
    for name in names:
        look_up(known, "attack of this budget", name)
    return tuple(attack for attack in attacks if attack.name in names)


def check_names(kind: str, names: list[str]) -> None:
    """Raise `ConfigError` for attacks of a budget that share a name."""
    if len(set(names)) != len(names):
        raise ConfigError(f"the {kind} of a budget need distinct names, got: {', '.join(names)}")
