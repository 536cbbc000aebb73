"""The measured rate of a bounded feature: a bound on I(x; z) on the data's own distribution, tighter than capacity.

    I(x; z) <= R = E_x KL( N(s(x), tau^2 I) || r )        for any density r that does not depend on x

r is a mixture of one Gaussian a class of the task's label, fitted on training data. KL to a mixture has no closed form;
with its components r_k and weights pi_k, -log sum_k pi_k exp(-KL(. || r_k)) bounds it from above (Hershey & Olsen 2007,
section 7), so that nothing is estimated by sampling but the mean over images. Axes: N rows, D dimensions, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import ConfigError, DataError
from orchestrator.privacy.bounded.channel import MIN_NOISE

Array: TypeAlias = NDArray[np.float64]

CONFIDENCE: Final = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class RateBound:
    """Mean rate of held-out images, in bits an image, with a two-sided 95 % interval of Student's t."""

    bits: float
    low: float
    high: float
    """The end to report as the bound; where it is above the channel's capacity, the capacity is the better bound."""
    n: int
    """Held-out images."""
    assumption: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MixturePrior:
    """r: one Gaussian of full covariance for each class of the task's label."""

    weights_K: Array  # noqa: N815 - a shape is part of the name
    means_KD: Array  # noqa: N815
    covariances_KDD: Array  # noqa: N815
    """Of z: of s, plus tau^2 I."""

    @classmethod
    def fit(cls, s_ND: NDArray[np.floating], y_N: NDArray[np.integer], *, tau: float) -> MixturePrior:
        """By the moments of z = s + tau n in each class that occurs. The noise is what keeps small classes regular.

        The rows must not be those that `rate_bound` gets. Raises `DataError` for other shapes or values.
        """
        _check_tau(tau)
        s_ND = np.asarray(s_ND, dtype=np.float64)
        if s_ND.ndim != 2 or y_N.shape != s_ND.shape[:1] or not len(s_ND) or not np.isfinite(s_ND).all():
            raise DataError(
                f"a prior is fitted on finite vectors (N, D) and labels (N,), got shapes {s_ND.shape} and {y_N.shape}"
            )
        noise = tau**2 * np.eye(s_ND.shape[1])
        groups = [s_ND[y_N == label] for label in np.unique(y_N)]
        return cls(
            weights_K=np.array([len(group) / len(s_ND) for group in groups]),
            means_KD=np.stack([group.mean(0) for group in groups]),
            covariances_KDD=np.stack(
                [np.atleast_2d(np.cov(group, rowvar=False, bias=True)) + noise for group in groups]
            ),
        )

    def kl_bits(self, s_ND: Array, tau: float) -> Array:
        """(N,): upper bound on KL(N(s, tau^2 I) || r) for each row."""
        d = s_ND.shape[1]
        exponents_KN = []
        for weight, mean, covariance in zip(self.weights_K, self.means_KD, self.covariances_KDD, strict=True):
            precision = np.linalg.inv(covariance)
            distance_N = np.einsum("nd,de,ne->n", s_ND - mean, precision, s_ND - mean)
            volume = np.linalg.slogdet(covariance)[1] - 2 * d * math.log(tau)
            kl_N = (tau**2 * np.trace(precision) + distance_N - d + volume) / 2
            exponents_KN.append(math.log(weight) - kl_N)
        bits: Array = -np.logaddexp.reduce(exponents_KN, axis=0) / math.log(2)
        return bits


def rate_bound(s: NDArray[np.floating], tau: float, prior: MixturePrior | Sequence[MixturePrior]) -> RateBound:
    """R over held-out vectors (N, D), or maps (N, D, H, W), whose cells are bounded one by one and summed.

    ``prior`` is of every cell, or one for each, row by row: their product is a density of the whole map.
    Raises `DataError` for fewer than 2 images, other shapes, or values that are not finite.
    """
    from scipy.stats import t

    _check_tau(tau)
    s_NDHW: Array = np.asarray(s, dtype=np.float64)
    priors = [prior] if isinstance(prior, MixturePrior) else list(prior)
    d = priors[0].means_KD.shape[1]
    if s_NDHW.ndim not in {2, 4} or s_NDHW.shape[1] != d or len(s_NDHW) < 2 or not np.isfinite(s_NDHW).all():
        raise DataError(
            f"a rate is measured on at least 2 finite vectors (N, {d}) or maps (N, {d}, H, W), got shape {s_NDHW.shape}"
        )
    n = len(s_NDHW)
    cells_NDL: Array = s_NDHW.reshape(n, d, -1)
    if len(priors) not in {1, cells_NDL.shape[2]}:
        raise DataError(f"{len(priors)} priors for {cells_NDL.shape[2]} cells: give one for each, or one for all")
    of_cells = priors * cells_NDL.shape[2] if len(priors) == 1 else priors
    bits_N = np.sum([prior.kl_bits(cells_NDL[..., cell], tau) for cell, prior in enumerate(of_cells)], axis=0)
    mean = float(bits_N.mean())
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * float(bits_N.std(ddof=1)) / math.sqrt(n)
    return RateBound(
        bits=mean,
        low=max(0.0, mean - half),
        high=mean + half,
        n=n,
        assumption=(
            "images are drawn as the held-out ones were, independently, and none of these was used to fit the prior or "
            "the feature; there are enough of them for Student's t; says nothing of images of another kind, for which "
            "the capacity bound holds"
        ),
    )


def _check_tau(tau: float) -> None:
    if not (math.isfinite(tau) and tau >= MIN_NOISE):
        raise ConfigError(f"the noise of a bounded feature must be a finite number >= {MIN_NOISE:g}, got {tau}")
