"""A8, few labels (SPEC E.4): what an attacker reads that can label only a handful of rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from orchestrator.errors import ConfigError
from orchestrator.evaluation.attacks.base import AttackInput, AttackResult, FloatArray, LabelArray, NotApplicable
from orchestrator.evaluation.attacks.linear import LinearAttack
from orchestrator.sampling import derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotAttack:
    """A1 on so many labelled rows, those on which it chooses included."""

    labels: int
    validation_fraction: float = 0.2
    """Of those labels, as far as there are validation rows."""
    underneath: LinearAttack = field(default_factory=LinearAttack)

    def __post_init__(self) -> None:
        if self.labels < 2 or not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"a few-shot attack needs at least 2 labels, of which a share between 0 and 1 is for validation; got "
                f"{self.labels} and {self.validation_fraction}"
            )

    @property
    def name(self) -> str:
        """``few_50``."""
        return f"few_{self.labels}"

    def run(self, data: AttackInput) -> AttackResult:
        """Draw the rows by the seed, train, answer for all test rows."""
        wanted = min(self.labels - 1, max(1, round(self.validation_fraction * self.labels)))
        n_validation = min(wanted, len(data.validation_y))
        n_train = self.labels - n_validation
        if len(data.train_y) < n_train:
            known = len(data.train_y) + len(data.validation_y)
            raise NotApplicable(f"there are {known} labelled rows, fewer than {self.labels}")
        rng = np.random.default_rng(derive_seed(data.seed, self.name))
        train_z, train_y = _drawn(rng, data.train_z, data.train_y, n_train)
        validation_z, validation_y = _drawn(rng, data.validation_z, data.validation_y, n_validation)
        few = replace(
            data,
            train_z=train_z,
            train_y=train_y,
            validation_z=validation_z,
            validation_y=validation_y,
            train_images=None,
            validation_images=None,
        )
        return replace(self.underneath.run(few), attack=self.name)


def _drawn(rng: np.random.Generator, z: FloatArray, y: LabelArray, n: int) -> tuple[FloatArray, LabelArray]:
    rows = rng.permutation(len(y))[:n]
    return z[rows], y[rows]
