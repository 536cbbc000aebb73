"""How much privacy a training has spent, and how much noise a budget needs.

Both accountants bound the same mechanism from above: Gaussian noise on the sum of the clipped gradients of a Poisson
sample, neighbours differing by one added or removed image. ``prv`` composes privacy loss random variables numerically
and is the tighter one; ``rdp`` (Renyi) is looser and immediate, and most likely what the paper used. Gaussian DP is
left out on purpose: it is an approximation, not a bound.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import CheckpointError, ConfigError, MissingExtraError, UnknownNameError

AccountantKind: TypeAlias = Literal["prv", "rdp"]
History: TypeAlias = tuple[tuple[float, float, int], ...]
"""Runs of equal steps, in order: (noise multiplier, sample rate, number of steps)."""

EPSILON_TOLERANCE: Final = 0.01
"""How far below the asked epsilon a calibrated noise may end, as in Opacus; a hundredth of an epsilon below 1."""
_PRV_ERROR: Final = 0.01
"""Numerical error allowed to PRV, already added to what it returns; Opacus's default."""
_MAX_NOISE_MULTIPLIER: Final = 1e5

# Opacus's orders, and further ones at both ends, so that the best order of a very small or very large budget is not the
# last one in the list.
_ORDERS: Final = (
    *(1.01, 1.02, 1.05),
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *range(12, 64),
    *(64, 80, 96, 128, 192, 256, 384, 512, 768, 1024),
)


def load_opacus() -> None:
    """Import Opacus without its side effect: left alone, it configures the root logger of the whole process.

    Raises `MissingExtraError` where it is not installed.
    """
    root, guard = logging.getLogger(), logging.NullHandler()
    root.addHandler(guard)  # logging.basicConfig does nothing when the root logger has a handler
    try:
        import opacus  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "opacus":
            raise
        raise MissingExtraError("cluster", "opacus") from error
    finally:
        root.removeHandler(guard)


@lru_cache(maxsize=256)
def _rdp_of_one_step(noise_multiplier: float, sample_rate: float) -> NDArray[np.float64]:
    """Renyi divergence bound of one step at each of `_ORDERS`."""
    load_opacus()
    from opacus.accountants.analysis.rdp import compute_rdp

    rdp = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=_ORDERS)
    return np.asarray(rdp, dtype=np.float64)


def _rdp_epsilon(history: History, delta: float) -> float:
    """Smallest epsilon over the orders, by Theorem 21 of Balle et al. 2020 (arXiv 1905.09982)."""
    if any(noise_multiplier == 0 for noise_multiplier, _, _ in history):
        return math.inf
    rdp = sum(steps * _rdp_of_one_step(sigma, q) for sigma, q, steps in history)
    orders = np.asarray(_ORDERS, dtype=np.float64)
    epsilon = rdp - (math.log(delta) + np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    return max(0.0, float(np.nanmin(epsilon)))


def _prv_epsilon(history: History, delta: float) -> float:
    """Upper end of PRV's interval, or the RDP bound where that is smaller or PRV's arithmetic breaks down."""
    renyi = _rdp_epsilon(history, delta)
    if math.isinf(renyi):
        return renyi
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings(), np.errstate(divide="ignore", over="raise", invalid="raise"):
        # PRV sizes its grid by RDP over Opacus's own orders; an order at the end of them only makes the grid larger.
        # The division is log(1 - q) at q = 1, a value that it then masks. An overflow (epsilon in the hundreds) may not
        # pass for a number.
        warnings.filterwarnings("ignore", message="Optimal order is the (largest|smallest) alpha", category=UserWarning)
        try:
            return min(renyi, float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR)))
        except (ValueError, RuntimeError, ArithmeticError):
            return renyi


ACCOUNTANTS: Final[Mapping[str, Callable[[History, float], float]]] = {"prv": _prv_epsilon, "rdp": _rdp_epsilon}
"""Accountant to epsilon of a history at a delta."""


def composed_epsilon(history: History, delta: float) -> float:
    """Epsilon of mechanisms that were run one after another on the same images, whatever each of them was, by RDP."""
    _check_delta(delta)
    for sigma, q, steps in history:
        _check_step(sigma, q)
        if steps < 0:
            raise ConfigError(f"the number of steps must be >= 0, got {steps}")
    return _rdp_epsilon(history, delta) if any(steps for _, _, steps in history) else 0.0


@lru_cache(maxsize=1024)
def _epsilon(kind: str, history: History, delta: float) -> float:
    _check_delta(delta)
    return ACCOUNTANTS[kind](history, delta) if history else 0.0


def epsilon_of(
    *, noise_multiplier: float, delta: float, sample_rate: float, steps: int, accountant: str = "prv"
) -> float:
    """Epsilon after ``steps`` equal steps, at that delta; infinite without noise.

    ``sample_rate`` is the probability with which each image enters a batch.
    """
    _check_kind(accountant)
    _check_step(noise_multiplier, sample_rate)
    if steps < 0:
        raise ConfigError(f"the number of steps must be >= 0, got {steps}")
    return _epsilon(accountant, ((noise_multiplier, sample_rate, steps),) if steps else (), delta)


@lru_cache(maxsize=256)
def noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "prv",
    before: History = (),
    alike: tuple[tuple[float, int], ...] = (),
) -> float:
    """The noise multiplier (sigma) at which ``steps`` steps cost ``epsilon``, or up to `EPSILON_TOLERANCE` less.

    ``epsilon`` is for these steps together with those ``before`` them on the same images, and with others ``alike``
    (sample rate, steps) that will have the same sigma. The same search as Opacus's, so the same sigma. Takes seconds
    with ``prv`` and long trainings; results are kept.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"epsilon must be a finite number > 0, got {epsilon}; leave it out to train without privacy")
    if steps < 1:
        raise ConfigError(f"a private training needs at least one step, got {steps}")

    _check_kind(accountant)
    tolerance = EPSILON_TOLERANCE * min(1.0, epsilon)

    def spent(sigma: float) -> float:
        for rate in (sample_rate, *(q for q, _ in alike)):
            _check_step(sigma, rate)
        history = (*before, (sigma, sample_rate, steps), *((sigma, q, n) for q, n in alike))
        bound = _epsilon("rdp", history, delta)
        # PRV's is the smaller bound, so where RDP's is clear of the target the search goes the same way without it.
        return bound if bound < epsilon - tolerance else _epsilon(accountant, history, delta)

    low, high = 0.0, 20.0
    while (spent_high := spent(high)) > epsilon:
        low, high = high, 2 * high
        if high > _MAX_NOISE_MULTIPLIER:
            raise ConfigError(
                f"no noise reaches epsilon {epsilon} at delta {delta} in {steps} steps of sample rate {sample_rate} "
                f"by {accountant}{_after(before, delta)}; raise epsilon, or take fewer steps"
            )
    while epsilon - spent_high > tolerance and high - low > high * 1e-9:
        middle = (low + high) / 2
        if (spent_middle := spent(middle)) < epsilon:
            high, spent_high = middle, spent_middle
        else:
            low = middle
    return high


def _after(before: History, delta: float) -> str:
    return f" after trainings that cost {rounded_up(_rdp_epsilon(before, delta))} already" if before else ""


def rounded_up(epsilon: float) -> str:
    """Two decimals, never less than the truth."""
    return f"{math.ceil(epsilon * 100) / 100:.2f}" if math.isfinite(epsilon) else "unbounded"


class Accountant:
    """What one training has spent, step by step. Owned by whoever takes the private steps, and saved with them.

    A step is charged *before* its result is used, so what is printed never lags behind what was released.
    """

    _KIND: Final = "privacy_accountant"
    _VERSION: Final = 1

    def __init__(self, kind: str = "prv") -> None:
        _check_kind(kind)
        self.kind = kind
        self._history: list[tuple[float, float, int]] = []

    @classmethod
    def of(cls, kind: str, *histories: History) -> Accountant:
        """What several trainings on the same images have spent together."""
        composed = cls(kind)
        for sigma, rate, steps in (run for history in histories for run in history):
            _check_step(sigma, rate)
            if composed._history and composed._history[-1][:2] == (sigma, rate):
                steps += composed._history.pop()[2]  # noqa: PLW2901 - the same run goes on
            composed._history.append((sigma, rate, steps))
        return composed

    def __repr__(self) -> str:
        return f"Accountant({self.kind!r}, steps={self.steps})"

    @property
    def steps(self) -> int:
        """Steps charged so far."""
        return sum(steps for _, _, steps in self._history)

    @property
    def history(self) -> History:
        """Runs of equal steps."""
        return tuple(self._history)

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Charge one step."""
        _check_step(noise_multiplier, sample_rate)
        if self._history and self._history[-1][:2] == (noise_multiplier, sample_rate):
            self._history[-1] = (noise_multiplier, sample_rate, self._history[-1][2] + 1)
        else:
            self._history.append((noise_multiplier, sample_rate, 1))

    def epsilon(self, delta: float) -> float:
        """Epsilon spent so far; 0.0 before the first step. With ``prv`` it takes up to seconds, and is then kept."""
        return _epsilon(self.kind, self.history, delta)

    def epsilon_upper(self, delta: float) -> float:
        """Epsilon spent so far by RDP: a bound that is looser than PRV's and costs microseconds, for progress lines."""
        return _rdp_epsilon(self.history, delta) if self._history else 0.0

    def state_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "kind": self._KIND,
            "version": self._VERSION,
            "accountant": self.kind,
            "history": [list(run) for run in self._history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned. Raises `CheckpointError`, and changes nothing, on anything else."""
        header = tuple(state.get(key) for key in ("kind", "version", "accountant"))
        expected = (self._KIND, self._VERSION, self.kind)
        if header != expected:
            raise CheckpointError(
                f"this is not the state of a {self.kind} accountant: expected {expected}, got {header}"
            )
        try:
            history = [(float(sigma), float(q), int(steps)) for sigma, q, steps in state["history"]]
            for sigma, q, steps in history:
                _check_step(sigma, q)
                if steps < 1:
                    raise ConfigError(f"a run of {steps} steps")
            if any(one[:2] == other[:2] for one, other in pairwise(history)):
                raise ConfigError("two equal runs in a row")
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise CheckpointError(f"the history of the privacy accountant is damaged: {error}") from error
        self._history = history


def _check_kind(kind: str) -> None:
    if kind not in ACCOUNTANTS:
        raise UnknownNameError("privacy accountant", kind, ACCOUNTANTS)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be between 0 and 1, got {delta}; choose one well below 1 / number of images")


def _check_step(noise_multiplier: float, sample_rate: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ConfigError(f"the noise multiplier must be a finite number >= 0, got {noise_multiplier}")
    if not 0 < sample_rate <= 1:
        raise ConfigError(
            f"the sample rate must be > 0 and <= 1, got {sample_rate}: it is batch size / number of images"
        )
