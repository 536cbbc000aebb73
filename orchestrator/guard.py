"""Whether what a consumer returns is a gradient of its task: the producer's guard against a broken or malicious one.

Axes: B examples of a batch, D numbers of one example's feature.

what is looked at      what it finds                                   when it trips
shape, type, NaN       a broken consumer                               at once
norm of an example     one that would outweigh everybody else          at once, against this task's own steps
use of the labels      one that pulls the network towards something    once there is evidence of some hundred examples
                       that is not its task ("hijacking")

*Use of the labels.* dL/dz of a classifier says: away from the wrong class, towards the right one. So two examples of
one label are pulled the same way, and two of different labels are pulled apart, from the first step to the last. Who
pulls every z towards an encoder of his own has no use for labels. With s and d the mean cosine between the gradients of
two examples of the same label and of different ones, two numbers tell the honest from the others:

agreement  how often a pair of the same label has the higher cosine. 1: a linear head on two classes; 0.5: blind.
contrast   (s - d) / (|s| + |d|). 1: different labels are pulled apart; 0: all are pulled the same way. A linear head
           stays above 1/3, which is two classes that are both taken for a third. It is what finds a hijacker whose
           pull depends on what is in the image, and so on the label too.

A task that answers with a map has no two examples of one label: of its gradients, shape and norm alone are looked at.
Both need the labels, which the producer has, and no change of the protocol. (Fu et al., "Focusing on Pinocchio's Nose",
NDSS 2023, compare such pairs as well.) Neither is proof of good faith: measured on digits, a hijacker
that adds the true gradient to the false one, in equal parts, passes, and reads images all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import ConfigError, ProtocolError
from orchestrator.wire import FeatureContract, FeatureGradient

_TINIEST: Final = 1e-3
"""Of the batch's median norm: gradients below are rounding, and say nothing about direction."""
_SMALLEST: Final = float(np.finfo(np.float32).tiny)
_NORMAL: Final = 1.4826 / math.sqrt(2)
"""From the median absolute difference of two draws to a normal distribution's standard deviation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """How far a gradient may go. Measured on digits: honest consumers stay well inside, from their first step."""

    warmup: int = 8
    """Steps from which a task's usual norm is known."""
    window: int = 64
    """Steps that are remembered after these."""
    first_norm: float = 1e4
    """The largest norm of an example's gradient, of its own loss and not of the batch's mean, during the warm-up."""
    norm_deviations: float = 8.0
    """How many deviations of the logarithm a norm may be above the task's usual one."""
    least_deviation: float = 0.375
    """In powers of ten: below that, deviations are taken to be this large. A factor of 1000 is always free."""
    agreement: float = 0.55
    """The least agreement with the labels, over the remembered steps. 0.5 is blind, 1 is perfect."""
    contrast: float = 0.25
    """The least contrast between labels, over the remembered steps. 0 is one pull for all, 1 is perfect."""
    evidence: int = 256
    """Examples that have to be seen before the use of labels is judged."""
    compared: int = 128
    """Examples of a batch that are compared pairwise."""

    def __post_init__(self) -> None:
        if min(self.warmup, self.window, self.evidence) < 1 or self.compared < 3:
            raise ConfigError("warmup, window and evidence of a guard must be at least 1, and compared at least 3")
        if not (0 <= self.agreement <= 1 and 0 <= self.contrast <= 1):
            raise ConfigError(
                f"agreement and contrast must be between 0 and 1, got {self.agreement} and {self.contrast}"
            )
        if not min(self.first_norm, self.norm_deviations, self.least_deviation) > 0:
            raise ConfigError("first_norm, norm_deviations and least_deviation of a guard must be > 0")


class LabelUse(NamedTuple):
    """What the gradients of one batch say about their labels."""

    agreement: float
    """How often a pair with one label has a higher cosine than a pair with two; ties count half."""
    same: float
    """Mean cosine of the pairs with one label."""
    different: float
    """Of the pairs with two."""


@dataclass(kw_only=True, slots=True)
class _Record:
    """What is remembered of one task: plain numbers, so that it can be saved."""

    first: list[float] = field(default_factory=list)
    """log10 of the largest norm of each step of the warm-up."""
    recent: list[float] = field(default_factory=list)
    """The same of the steps after it."""
    labels: list[tuple[float, float, float, int]] = field(default_factory=list)
    """`LabelUse`, and of how many examples, of each step that said anything about it."""


class GradientGuard:
    """One session's guard. It is asked once a step and task; what it decides, it does not take back.

    Owned by the producer, whose state holds its own: a resumed run decides as the interrupted one would have.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._records: dict[str, _Record] = {}
        self._quarantined: dict[str, str] = {}

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Task to the reason why its consumer is not listened to any more."""
        return self._quarantined

    def quarantine(self, task: str, reason: str) -> None:
        """Listen to it no more. The first reason stays."""
        self._quarantined.setdefault(task, reason)

    def accepts(
        self,
        message: FeatureGradient | None,
        *,
        contract: FeatureContract,
        step: int,
        labels: NDArray[np.int64],
    ) -> bool:
        """Whether this step's gradient may be applied; if not, its task is in quarantine from now on.

        ``message`` is None where the consumer sent nothing; ``labels`` are those of the batch, (B,) or (B, C, H, W).
        """
        task = contract.task
        if task in self._quarantined:
            return False
        try:
            gradient = check_gradient(message, contract=contract, step=step, n_examples=len(labels))
        except ProtocolError as error:
            self.quarantine(task, str(error))
            return False
        if len(labels):
            rows_BD = gradient.reshape(len(gradient), -1)
            # einsum reads float32 and adds up float64 piece by piece: nothing overflows, and no copy is made.
            norms_B = len(rows_BD) * np.sqrt(np.einsum("bd,bd->b", rows_BD, rows_BD, dtype=np.float64))
            record = self._records.setdefault(task, _Record())
            reason = self._norm_fault(record, norms_B)
            if not reason and labels.ndim == 1:
                reason = self._label_fault(record, rows_BD, norms_B, labels)
            if reason:
                self.quarantine(task, f"{reason} (step {step})")
                return False
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on."""
        return {
            "records": {task: asdict(record) for task, record in self._records.items()},
            "quarantined": dict(self._quarantined),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._quarantined = {str(task): str(reason) for task, reason in state["quarantined"].items()}
        self._records = {
            task: _Record(
                first=[float(level) for level in record["first"]],
                recent=[float(level) for level in record["recent"]],
                labels=[(float(a), float(s), float(d), int(n)) for a, s, d, n in record["labels"]],
            )
            for task, record in state["records"].items()
        }

    def _norm_fault(self, record: _Record, norms_B: NDArray[np.float64]) -> str:
        largest = float(norms_B.max())
        if largest == 0:
            return ""
        level, limit = math.log10(largest), self._norm_limit(record)
        if level > limit:
            return f"a gradient has norm {largest:.3g}, and at most {10**limit:.3g} is expected of this task"
        levels = record.first if len(record.first) < self.config.warmup else record.recent
        levels.append(level)
        del record.recent[: -self.config.window]
        return ""

    def _norm_limit(self, record: _Record) -> float:
        """log10. A gradient as large as those at the beginning is never suspicious: a hard example makes one.

        Deviations are taken from step to step, or norms that fall as training goes on would allow for anything.
        """
        if len(record.first) < self.config.warmup:
            return math.log10(self.config.first_norm)
        parts = [np.asarray(levels) for levels in (record.first, record.recent) if levels]
        medians = [float(np.median(part)) for part in parts]
        deviations = [_NORMAL * float(np.median(np.abs(np.diff(p)))) if len(p) > 1 else 0.0 for p in parts]
        return max(
            median + self.config.norm_deviations * max(self.config.least_deviation, deviation)
            for median, deviation in zip(medians, deviations, strict=True)
        )

    def _label_fault(
        self, record: _Record, rows_BD: NDArray[np.float32], norms_B: NDArray[np.float64], labels: NDArray[np.int64]
    ) -> str:
        some = slice(0, self.config.compared)
        use = label_use(rows_BD[some], norms_B[some], labels[some])
        if use is None:
            return ""
        record.labels.append((*use, len(labels[some])))
        del record.labels[: -self.config.window]
        *columns, examples = (np.asarray(column) for column in zip(*record.labels, strict=True))
        if examples.sum() < self.config.evidence:
            return ""
        agreement, same, different = (float(np.average(column, weights=examples)) for column in columns)
        contrast = (same - different) / max(abs(same) + abs(different), _SMALLEST)
        if agreement >= self.config.agreement and contrast >= self.config.contrast:
            return ""
        return (
            f"its gradients do not follow its labels, and an honest consumer's do (agreement {agreement:.2f}, at least "
            f"{self.config.agreement:g} is expected; contrast {contrast:.2f}, at least {self.config.contrast:g}): "
            "it trains something that is not its task"
        )


def check_gradient(
    message: FeatureGradient | None, *, contract: FeatureContract, step: int, n_examples: int
) -> NDArray[np.float32]:
    """The gradient of one message. Raises `ProtocolError` for what the protocol does not allow."""
    task = contract.task
    if message is None:
        raise ProtocolError(f"task {task!r} sent no gradient at step {step}")
    if message.step != step:
        raise ProtocolError(f"task {task!r} sent the gradient of step {message.step} at step {step}")
    if not (isinstance(message.loss, float) and math.isfinite(message.loss)):
        raise ProtocolError(f"task {task!r} sent the loss {message.loss} at step {step}, which is no finite number")
    contract.check("the gradient", message.gradient, n_examples)
    return message.gradient


def label_use(
    rows_BD: NDArray[np.float32], norms_B: NDArray[np.float64], labels_B: NDArray[np.int64]
) -> LabelUse | None:
    """None where the batch says nothing: all examples have one label, or each has its own."""
    usable = np.flatnonzero(norms_B > max(_TINIEST * float(np.median(norms_B)), _SMALLEST))
    if len(usable) < 3:
        return None
    pair = np.tri(len(usable), k=-1, dtype=bool)
    one = labels_B[usable][:, None] == labels_B[usable]
    if one[pair].all() or not one[pair].any():
        return None
    # Rounded, so that equal directions are ties.
    cosines = _cosines(rows_BD)[np.ix_(usable, usable)].round(5)
    # Both sorted: a search that moves on from the one before is several times as quick.
    same, different = np.sort(cosines[pair & one]), np.sort(cosines[pair & ~one])
    below = np.searchsorted(different, same, side="left") + np.searchsorted(different, same, side="right")
    return LabelUse(float(below.mean() / (2 * len(different))), float(same.mean()), float(different.mean()))


def _cosines(rows_BD: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B, B), between every two rows; 0 for a row of zeros. Float32 will do, whatever the norms.

    A row's largest number becomes 1 first, so that no square overflows, and none that counts vanishes.
    """
    largest_B = np.maximum(rows_BD.max(axis=1), -rows_BD.min(axis=1))
    largest_B[largest_B == 0] = 1
    scaled_BD = rows_BD / largest_B[:, None]
    products_BB = scaled_BD @ scaled_BD.T
    # Only a row of zeros is shorter than 1.
    lengths_B = np.sqrt(np.maximum(products_BB.diagonal(), 1))
    cosines_BB: NDArray[np.float32] = products_BB / np.outer(lengths_B, lengths_B)
    return cosines_BB
