"""Disjoint subsets of a data set's rows.

``train`` and ``validation`` are the defence's, ``attacker`` is what attackers learn from (never trained on, so
that memory does not flatter an attack), ``test`` measures both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from tasks.datasets.table import ImageTable
from tasks.errors import ConfigError, DataError
from tasks.registry import look_up

RowArray = NDArray[np.int64]

SUBSETS = ("train", "validation", "attacker", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitFractions:
    """The share of rows of each subset; they sum to 1."""

    train: float = 0.5
    validation: float = 0.1
    attacker: float = 0.2
    test: float = 0.2

    def __post_init__(self) -> None:
        shares = astuple(self)
        if not all(math.isfinite(share) and share > 0 for share in shares):
            raise ConfigError(f"every subset needs a share > 0, got {self.text}")
        if abs(sum(shares) - 1) > 1e-6:
            raise ConfigError(f"the shares of the subsets must sum to 1, got {self.text}, which sum to {sum(shares):g}")

    @property
    def text(self) -> str:
        """For messages."""
        return ", ".join(f"{name} {share:g}" for name, share in zip(SUBSETS, astuple(self), strict=True))

    def quotas(self, n: int) -> tuple[Fraction, ...]:
        """Each subset's share of ``n`` rows, exactly: they sum to ``n``."""
        shares = [Fraction(share).limit_denominator(10**9) for share in astuple(self)]
        return tuple(n * share / sum(shares) for share in shares)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Splits:
    """Row numbers of each subset, in shuffled order: a tenant sees an example's position, and in the file's order
    neighbours are often the same person or video."""

    train: RowArray = field(repr=False)
    validation: RowArray = field(repr=False)
    attacker: RowArray = field(repr=False)
    test: RowArray = field(repr=False)

    def subset(self, name: str) -> RowArray:
        """The rows of one of `SUBSETS`; example id ``k`` is the ``k``-th. Raises `UnknownNameError`."""
        return look_up({s: getattr(self, s) for s in SUBSETS}, "subset", name)


def split_rows(
    n: int, *, seed: int, fractions: SplitFractions = SplitFractions(), groups: RowArray | None = None
) -> Splits:
    """Cut ``n`` rows into disjoint subsets that cover them all, at random by ``seed`` (PCG64).

    Without groups, sizes are exact: each share rounded down, and what is left over to the largest remainders.
    With groups (N,), all rows of a group go to the same subset. Groups are placed from the largest to the smallest
    (equals in random order), each where most rows are still missing; so no subset exceeds its share by as much as its
    largest group.
    Raises `DataError` when a subset would be empty.
    """
    if seed < 0:
        raise ConfigError(f"the seed of a split must be >= 0, got {seed}")
    rng = np.random.Generator(np.random.PCG64(seed))
    shuffled = rng.permutation(n)
    if groups is None:
        ends = np.cumsum(_exact_sizes(n, fractions))
        parts = np.split(shuffled, ends[:-1])
    else:
        assert groups.shape == (n,), (groups.shape, n)
        place = _place_groups(groups, fractions, rng)
        parts = [shuffled[place[shuffled] == s] for s in range(len(SUBSETS))]
    return Splits(**dict(zip(SUBSETS, parts, strict=True)))


def check_labels(table: ImageTable, splits: Splits, tasks: Iterable[str]) -> None:
    """Raise `DataError` unless every class of every task occurs among the training rows. Maps have no classes."""
    for task in tasks:
        if table.spec(task).dense:
            continue
        classes = table.spec(task).classes
        counts = np.bincount(table.task_labels(task)[splits.train], minlength=len(classes))
        if missing := [classes[k] for k in np.flatnonzero(counts == 0)]:
            shown = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            grouping = "" if table.groups is None else "another --group-by, "
            raise DataError(
                f"no training image of task {task!r} has class {shown} (of {len(classes)} "
                f"classes), so it cannot be learned; choose {grouping}another --split-seed, a larger training share, "
                "or data with more rows of it"
            )


def _exact_sizes(n: int, fractions: SplitFractions) -> list[int]:
    quotas = fractions.quotas(n)
    sizes = [math.floor(q) for q in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda s: sizes[s] - quotas[s])
    for s in by_remainder[: n - sum(sizes)]:
        sizes[s] += 1
    if empty := [name for name, size in zip(SUBSETS, sizes, strict=True) if size == 0]:
        enough = math.ceil(1 / min(fractions.quotas(1)))
        raise DataError(
            f"{n} row(s) are too few: subset {', '.join(empty)} would be empty (shares: {fractions.text}); "
            f"use at least {enough} rows, or other shares"
        )
    return sizes


def _place_groups(groups: RowArray, fractions: SplitFractions, rng: np.random.Generator) -> RowArray:
    """(N,) the subset of each row, as an index into `SUBSETS`."""
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(sizes) < len(SUBSETS):
        raise DataError(
            f"{len(sizes)} group(s) are too few for {len(SUBSETS)} subsets ({', '.join(SUBSETS)}) without a common "
            "group; group by another column, or by none"
        )
    missing = np.array(fractions.quotas(len(groups)), dtype=np.float64)
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    place = np.empty(len(sizes), dtype=np.int64)
    everywhere, empty = range(len(SUBSETS)), set(range(len(SUBSETS)))
    for rank, group in enumerate(order):
        # When only as many groups are left as subsets are empty, each of these must get one.
        candidates = sorted(empty) if len(empty) == len(order) - rank else everywhere
        chosen = max(candidates, key=lambda s: missing[s])
        place[group] = chosen
        missing[chosen] -= sizes[group]
        empty.discard(chosen)
    return place[member]
