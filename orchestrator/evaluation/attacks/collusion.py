"""A7, collusion (SPEC E.4): two tenants put together what each received of the same image.

The attackers are those of A1 to A3; this is what they are given. Axes: N rows, C channels, H and W of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from orchestrator.evaluation.attacks.base import FloatArray

Coalition = tuple[str, ...]
"""Tasks whose tenants share their features: one, or two that collude."""


def pairs(released: Sequence[str], targets: Sequence[str]) -> list[tuple[Coalition, str]]:
    """Every two released features, with every target that neither of their tenants bought."""
    return [
        (coalition, target) for coalition in combinations(released, 2) for target in targets if target not in coalition
    ]


def joined(parts: Sequence[FloatArray]) -> FloatArray:
    """Features of the same rows as one: along the channels where the maps are of equal size, else flattened."""
    if len(parts) == 1:
        return parts[0]
    if len({z.shape[2:] for z in parts}) == 1:
        return np.concatenate(parts, axis=1)
    return np.concatenate([z.reshape(len(z), -1) for z in parts], axis=1)
