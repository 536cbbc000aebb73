"""What the bits of a bounded feature allow an attacker, whoever it is and whatever it computes.

Each bound comes with the sentence that says what it assumes. Information is in bits. S is the secret that is guessed, y
the label of the task that was bought, x the image and z the released feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from orchestrator.errors import ConfigError
from orchestrator.privacy.bounded.channel import ChannelConfig

Method: TypeAlias = Literal["fano", "guessing", "rate_distortion"]

_LN2: Final = math.log(2)
_HALVINGS: Final = 100
"""Of an interval in bisections: more than a double resolves."""
_SUM_TOLERANCE: Final = 1e-6
"""How far from 1 given probabilities may sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InformationBound:
    """At most so many bits."""

    bits: float
    assumption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyBound:
    """No attacker is right more often than this."""

    accuracy: float
    method: Method
    """Which inequality gave it, the smallest of those that apply."""
    assumption: str


def capacity_bound(channel: ChannelConfig) -> InformationBound:
    """I(x; z) of one release of one image; see `orchestrator.privacy.bounded.channel`."""
    return InformationBound(
        bits=channel.bits_per_image,
        assumption=(
            "one release of an image, or any number of releases with the same noise; holds for every distribution of "
            "images and every attacker who cannot tell the noise from random, as no one without its key can; several "
            "tasks, versions or fresh draws of noise add up"
        ),
    )


def left_for_secret(bits: float, task_bits: float) -> InformationBound:
    """I(z; S | y), what z tells of any secret beyond the task's label: at most I(x; z) - I(z; y).

    ``bits`` bounds I(x; z) from above. ``task_bits`` bounds I(z; y) from below, for instance `bits_needed` by the
    accuracy of the task's own head, or H(y) minus its cross-entropy. From the chain rule, as y is a function of x:
    I(x; z) = I(x, y; z) = I(y; z) + I(x; z | y), and S reaches z only through x.
    """
    _check_bits(bits)
    _check_bits(task_bits)
    return InformationBound(
        bits=max(0.0, bits - task_bits),
        assumption=(
            "the task's label is a function of the image, the noise is independent of the secret, and the task's own "
            "bits are not overstated"
        ),
    )


def accuracy_bound(bits: float, prior: Sequence[float]) -> AccuracyBound:
    """The smallest of the bounds below on guessing a secret of that ``prior`` from z, when I(S; z) <= ``bits``.

    `rate_distortion_accuracy_bound` is never larger than the other two. Where another is equal it is named, as it is
    better known: Fano's for uniform priors.
    """
    bounds: dict[Method, float] = {
        "fano": fano_accuracy_bound(bits, prior),
        "guessing": guessing_accuracy_bound(bits, max(_checked(prior))),
        "rate_distortion": rate_distortion_accuracy_bound(bits, prior),
    }
    method = min(bounds, key=lambda name: round(bounds[name], 9))
    return AccuracyBound(
        accuracy=bounds[method],
        method=method,
        assumption=(
            "the secret has the given prior, the attacker sees nothing of the image but features that carry the given "
            "bits, and is right as often as the bound on average over images, not for each one"
        ),
    )


def accuracy_bound_given_task(bits: float, task_bits: float, floor: float) -> AccuracyBound:
    """On guessing a secret when y itself is known beside z, so that only the excess over ``floor`` is z's doing.

    ``floor`` is the accuracy of the best guess from y alone, sum_y P(y) max_s P(s | y). With a the attacker's accuracy,
    d(a || floor) <= I(z; S | y) bits: `guessing_accuracy_bound` for each y, and d is jointly convex.
    """
    left = left_for_secret(bits, task_bits)
    return AccuracyBound(
        accuracy=guessing_accuracy_bound(left.bits, floor),
        method="guessing",
        assumption=f"{left.assumption}; the floor is the best guess of the secret from the task's label alone",
    )


def fano_accuracy_bound(bits: float, prior: Sequence[float]) -> float:
    """Fano's: 1 - P_err, P_err the smallest solution of H_b(P_err) + P_err log2(M - 1) >= H(S) - ``bits``.

    Sharper than the usual (H(S) - I - 1) / log2(M - 1). M counts the classes that occur. For a prior that is not
    uniform it is larger than the largest prior at 0 bits; see `guessing_accuracy_bound`.
    """
    _check_bits(bits)
    prior = _checked(prior)
    m, missing = len(prior), _entropy(prior) - bits
    if m == 1 or missing <= 0:
        return 1.0
    error, _ = _bisect(lambda p: _binary_entropy(p) + p * math.log2(m - 1) < missing, 0.0, 1 - 1 / m)
    return max(1 - error, *prior)


def guessing_accuracy_bound(bits: float, base: float) -> float:
    """The largest a with d(a || base) <= ``bits``, d the binary divergence; ``base`` is the largest prior.

    By data processing on "was the guess right": I(S; guess) >= d(a || sum_s P(s) Q(s)) >= d(a || max_s P(s)), with Q
    the distribution of guesses. At 0 bits it is ``base``.
    """
    _check_bits(bits)
    if not 0 < base <= 1:
        raise ConfigError(f"the accuracy of a guess without the feature must be > 0 and <= 1, got {base}")
    if bits >= -math.log2(base):
        return 1.0
    _, accuracy = _bisect(lambda a: _binary_divergence(a, base) <= bits, base, 1.0)
    return accuracy


def rate_distortion_accuracy_bound(bits: float, prior: Sequence[float]) -> float:
    """The largest accuracy that does with ``bits``, by `bits_needed`. Bits and prior alone give no smaller bound."""
    _check_bits(bits)
    prior = _checked(prior)
    if bits >= _entropy(prior):
        return 1.0
    _, accuracy = _bisect(lambda a: _rate(a, prior) <= bits, prior[0], 1.0)
    return accuracy


def bits_needed(accuracy: float, prior: Sequence[float]) -> float:
    """Least I(S; z) with which S, of that prior, can be guessed with that accuracy.

    The rate-distortion function of a discrete source under Hamming distortion (Erokhin 1958). 0 up to the largest
    prior, the entropy of the prior at accuracy 1. As a lower bound on what a head's measured accuracy proves of I(z; y)
    it holds on the distribution of the test images, up to their sampling error.
    """
    if not 0 <= accuracy <= 1:
        raise ConfigError(f"an accuracy must be from 0 to 1, got {accuracy}")
    return _rate(accuracy, _checked(prior))


def local_dp_epsilon(channel: ChannelConfig, delta: float) -> float:
    """Epsilon of local differential privacy of one release: any two images, not neighbours.

    Two vectors of power d are at most 2 sqrt(d) apart, and all cells of an image may differ at once. Large by nature:
    the bits are the useful bound.
    """
    return gaussian_epsilon(2 * math.sqrt(channel.dimensions * channel.cells), channel.noise, delta)


def gaussian_epsilon(sensitivity: float, noise: float, delta: float) -> float:
    """Epsilon of Gaussian noise of that standard deviation, at that L2 sensitivity; exact, not a bound.

    The smallest epsilon with Phi(D/2s - eps s/D) - e^eps Phi(-D/2s - eps s/D) <= delta (Balle & Wang 2018, theorem 8).
    """
    if not (sensitivity >= 0 and noise > 0 and math.isfinite(sensitivity) and math.isfinite(noise)):
        raise ConfigError(f"sensitivity must be >= 0 and noise > 0, both finite, got {sensitivity} and {noise}")
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be between 0 and 1, got {delta}")
    ratio, target = sensitivity / noise, math.log(delta)
    if ratio == 0 or _log_delta(0.0, ratio) <= target:
        return 0.0
    high = 1.0
    while _log_delta(high, ratio) > target:
        high *= 2
    _, epsilon = _bisect(lambda eps: _log_delta(eps, ratio) > target, 0.0, high)
    return epsilon


def _log_delta(epsilon: float, ratio: float) -> float:
    """Natural logarithm of the delta at which a Gaussian mechanism of that sensitivity / noise has that epsilon.

    e^eps Phi(b) is of the size of Phi(a), and either may be too small for a float. As e^eps phi(b) = phi(a), both share
    the factor phi(a), and what remains is a difference of Mills ratios, which erfcx gives without loss.
    """
    from scipy.special import erfcx, ndtr

    a, b = ratio / 2 - epsilon / ratio, -ratio / 2 - epsilon / ratio
    if a > 5:  # delta is nearly 1 and nothing cancels; erfcx of a large negative number would overflow
        tail = math.exp(-(a**2) / 2) / 2 * float(erfcx(-b / math.sqrt(2)))
        return math.log(float(ndtr(a)) - tail)
    mills = float(erfcx(-a / math.sqrt(2)) - erfcx(-b / math.sqrt(2)))
    return -(a**2) / 2 - _LN2 + math.log(mills) if mills > 0 else -math.inf


def _rate(accuracy: float, prior: Sequence[float]) -> float:
    """`bits_needed` for a checked prior.

    The best guesses leave the rarest classes out, and with n classes left in every wrong class of these is as likely,
    theta; with it a = sum of the n priors - (n - 1) theta, and the n are those whose prior is above theta.
    """
    if accuracy <= prior[0]:
        return 0.0
    n = len(prior)
    theta = (math.fsum(prior) - accuracy) / (n - 1)
    while n > 2 and theta > prior[n - 1]:
        n -= 1
        theta = (math.fsum(prior[:n]) - accuracy) / (n - 1)
    theta = max(0.0, theta)
    return max(0.0, _entropy(prior[:n]) + _x_log_x(accuracy) + (n - 1) * _x_log_x(theta))


def _bisect(is_left: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """The end of ``low..high`` up to which ``is_left`` is true, from both sides."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if is_left(middle):
            low = middle
        else:
            high = middle
    return low, high


def _checked(prior: Sequence[float]) -> tuple[float, ...]:
    """The probabilities that are not 0, largest first, with sum 1."""
    values = [float(p) for p in prior]
    total = math.fsum(values) if values else math.nan
    if not (all(p >= 0 for p in values) and abs(total - 1) <= _SUM_TOLERANCE):
        raise ConfigError(f"a prior is probabilities >= 0 that sum to 1, got {len(values)} that sum to {total}")
    return tuple(sorted((p / total for p in values if p), reverse=True))


def _check_bits(bits: float) -> None:
    if not bits >= 0:
        raise ConfigError(f"bits must be >= 0, got {bits}")


def _x_log_x(p: float) -> float:
    return p * math.log2(p) if p else 0.0


def _entropy(prior: Sequence[float]) -> float:
    return -math.fsum(_x_log_x(p) for p in prior)


def _binary_entropy(p: float) -> float:
    return -_x_log_x(p) - _x_log_x(1 - p)


def _binary_divergence(a: float, b: float) -> float:
    """d(a || b) in bits, for 0 < b < 1."""
    return _x_log_x(a) + _x_log_x(1 - a) - a * math.log2(b) - (1 - a) * math.log1p(-b) / _LN2
