"""A2, a multi-layer perceptron on the whole feature (SPEC E.4): interactions of coordinates wherever they lie."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import nn

from orchestrator.evaluation.attacks.base import AttackInput, AttackResult
from orchestrator.evaluation.attacks.fitting import Fitting, answered, seeded, standardised_maps


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpAttack(Fitting):
    """Two hidden layers behind a LayerNorm, on the flattened feature."""

    name: str = "mlp"
    width: int = 256
    """Of both hidden layers."""
    dropout: float = 0.3

    def __post_init__(self) -> None:
        Fitting.__post_init__(self)  # super() does not work in a dataclass with slots
        self.check_count("width")

    def run(self, data: AttackInput) -> AttackResult:
        """Train on the training rows, choose on the validation rows, answer for the test rows."""
        started = time.perf_counter()
        train_z, validation_z, test_z = (z.flatten(1) for z in standardised_maps(data))
        with seeded(data.seed, data.device):
            network = self._network(train_z.shape[1], data.n_classes).to(data.device)
            best = self.fit(network, data, train_z, validation_z)
        return answered(self.name, data, network, best, test_z, started=started)

    def _network(self, n_features: int, n_classes: int) -> nn.Module:
        # Over one or two coordinates a LayerNorm would leave a sign or nothing.
        norm = nn.LayerNorm(n_features) if n_features > 2 else nn.Identity()
        hidden: list[nn.Module] = []
        for inputs in (n_features, self.width):
            hidden += [nn.Linear(inputs, self.width), nn.ReLU(), nn.Dropout(self.dropout)]
        return nn.Sequential(norm, *hidden, nn.Linear(self.width, n_classes))
