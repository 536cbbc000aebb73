"""A1, the linear probe (SPEC E.4): what lies open in a feature. Axes: N examples, D coordinates, K classes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.evaluation.attacks.base import AttackInput, AttackResult, FloatArray, score

ROTATE_UP_TO = 1024
"""Rows up to which a wide matrix is rotated into the span of its rows before the solver runs."""

MEMORISED = 0.02
"""Training objective, in nats, below which a weaker penalty would only make the same answers more confident."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearAttack:
    """Multinomial logistic regression on the flattened, standardised feature.

    The L2 strength is chosen by validation cross-entropy, after which the model is refitted on training and validation
    rows together. No coordinate is dropped: with fewer rows than coordinates the regularised solution lies in
    the span of the rows, so working in that span is exact, whereas a principal-component cut would hide from this
    attacker whatever a defence pushed into directions of little variance.
    """

    name: str = "linear"
    strengths: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """L2 strengths, falling, for rows scaled to a mean square length of one so that they mean the same for every D."""
    max_iterations: int = 50
    """Of L-BFGS, for each strength; each starts from the solution before."""

    def run(self, data: AttackInput) -> AttackResult:
        """Train on the training rows, choose on the validation rows, answer for the test rows."""
        started = time.perf_counter()
        n_train, n_known = len(data.train_y), len(data.train_y) + len(data.validation_y)
        x_ND = _prepare([data.train_z, data.validation_z, data.test_z], n_known, data.device)
        y_N = torch.cat([torch.from_numpy(data.train_y), torch.from_numpy(data.validation_y)]).to(data.device)
        probe = _Probe(x_ND.shape[1], data.n_classes, self.max_iterations, data.device)
        strength, validation_logits = self._choose(probe, x_ND[:n_known], y_N, n_train)
        probe.fit(x_ND[:n_known], y_N, strength)
        return score(
            self.name,
            data,
            validation_logits=validation_logits.cpu().numpy(),
            test_logits=probe.logits(x_ND[n_known:]).cpu().numpy(),
            seconds=time.perf_counter() - started,
        )

    def _choose(self, probe: _Probe, x_ND: Tensor, y_N: Tensor, n_train: int) -> tuple[float, Tensor]:
        """The strength with the least validation cross-entropy and its logits; the probe is left at that solution."""
        best = (float("inf"), self.strengths[0], torch.empty(0), probe.snapshot())
        for strength in self.strengths:
            fit_loss = probe.fit(x_ND[:n_train], y_N[:n_train], strength)
            logits = probe.logits(x_ND[n_train:])
            loss = functional.cross_entropy(logits, y_N[n_train:]).item()
            if loss < best[0]:
                best = (loss, strength, logits, probe.snapshot())
            # A worse validation loss is no reason to stop: a secret under strong noise is found after the noise.
            if fit_loss < MEMORISED:
                break
        probe.restore(best[3])
        return best[1], best[2]


class _Probe:
    """Weights (K, D) and biases (K,) of a softmax regression, fitted by full-batch L-BFGS."""

    def __init__(self, n_features: int, n_classes: int, max_iterations: int, device: str) -> None:
        self.weight = torch.zeros(n_classes, n_features, device=device, requires_grad=True)
        self.bias = torch.zeros(n_classes, device=device, requires_grad=True)
        self.max_iterations = max_iterations

    def fit(self, x_ND: Tensor, y_N: Tensor, strength: float) -> float:
        """Minimise mean cross-entropy + strength / 2 * ||W||^2 from the present weights; returns the minimum."""
        solver = torch.optim.LBFGS(
            [self.weight, self.bias],
            max_iter=self.max_iterations,
            tolerance_grad=1e-5,
            tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            solver.zero_grad()
            logits = self._logits(x_ND)
            loss = functional.cross_entropy(logits, y_N) + 0.5 * strength * self.weight.square().sum()
            loss.backward()
            return loss

        solver.step(objective)
        return objective().item()

    @torch.no_grad()
    def logits(self, x_ND: Tensor) -> Tensor:
        """(N, K)."""
        return self._logits(x_ND)

    def _logits(self, x_ND: Tensor) -> Tensor:
        return x_ND @ self.weight.T + self.bias

    @torch.no_grad()
    def snapshot(self) -> tuple[Tensor, Tensor]:
        """A copy of the weights."""
        return self.weight.clone(), self.bias.clone()

    @torch.no_grad()
    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Go back to a copy."""
        self.weight.copy_(state[0])
        self.bias.copy_(state[1])


def _prepare(parts: list[FloatArray], n_known: int, device: str) -> Tensor:
    """All rows as one matrix, standardised by the known ones, and rotated into their span where that is cheaper."""
    x_ND: Tensor = torch.cat([torch.from_numpy(part).flatten(1) for part in parts]).to(device, torch.float32)
    std, mean = torch.std_mean(x_ND[:n_known], dim=0, correction=0)
    x_ND = (x_ND - mean) / (torch.where(std > 0, std, 1.0) * x_ND.shape[1] ** 0.5)
    if n_known > min(ROTATE_UP_TO, x_ND.shape[1]):
        return x_ND
    # In double: the small directions are the ones that must not drown in rounding.
    known = x_ND[:n_known].double()
    squares, vectors = torch.linalg.eigh(known @ known.T)
    kept = squares > 1e-12 * squares[-1]
    basis: Tensor = known.T @ (vectors[:, kept] / squares[kept].sqrt())
    return x_ND @ basis.float()
