"""Of ``audit.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.privacy.dp import DpMode


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditSettings:
    """Try out what the guarantees say: train many times with and without one canary, and tell the two apart.

    Prints a lower bound on epsilon beside the claim, for every mode of differential privacy, and whether three faults
    are seen: the noise off, the clip removed, and a head that learns without noise. Nothing is read or published. Ends
    with status 1 if a claim does not hold or a fault is not seen.
    """

    modes: tuple[str, ...] = get_args(DpMode)
    """Which modes, as A,B,C. Noise and clip are taken from the first that guarantees something."""
    epsilon: float = 4.0
    """The epsilon that every training claims."""
    runs: int = 1000
    """Trainings with the canary, and as many without, for each row. More of them show more."""
    confidence: float = 0.95
    """Of each bound."""
    seed: int | None = None
    """Makes the audit repeatable. Default: fresh noise and batches from the operating system."""
    processes: int | None = None
    """Trainings at a time. Default: as many as there are cores, up to 8."""
    out: Path | None = None
    """Write the numbers to this JSON file, too."""

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in get_args(DpMode):
                raise UnknownNameError("mode", mode, get_args(DpMode))
        if not self.modes or len(set(self.modes)) != len(self.modes):
            raise ConfigError(f"--modes {','.join(self.modes)!r} must name each mode once, and one at least")
        if self.runs < 2:
            raise ConfigError(f"runs must be at least 2, got {self.runs}: half of them choose the attacker's threshold")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence must be > 0 and < 1, got {self.confidence}")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"seed must be >= 0, got {self.seed}")
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"processes must be at least 1, got {self.processes}")
