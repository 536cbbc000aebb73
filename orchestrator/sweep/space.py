"""What a sweep varies: a distribution for each dimension, and the points that it may try.

    0,1e-3,1e-2            these values (``choice:`` may stand before them)
    uniform:LOW:HIGH       any number between, each as likely
    loguniform:LOW:HIGH    the same on a logarithmic scale

``none`` is a value of epsilon (trained without DP) and of the bits of a feature (not bounded).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from orchestrator.errors import ConfigError

Value: TypeAlias = float | int | None
Kind: TypeAlias = Literal["choice", "uniform", "loguniform"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One configuration with one seed: all that distinguishes a trial from the others."""

    omega: float | None
    """None: as the kind of feature has it by default."""
    epsilon: float | None
    """None: trained without DP."""
    split_index: int
    feature_bits: float | None
    """None: features are not bounded."""
    seed: int

    @property
    def configuration(self) -> tuple[Value, ...]:
        """What the seeds of one configuration have in common."""
        return self.omega, self.epsilon, self.split_index, self.feature_bits

    @property
    def words(self) -> str:
        """For a line in the terminal and the name of a run."""
        bits = "" if self.feature_bits is None else f", {self.feature_bits:g} bits"
        encoder = f"split {self.split_index}, epsilon {shown(self.epsilon)}"
        return f"{encoder}, omega {shown(self.omega)}{bits}, seed {self.seed}"

    def to_json(self) -> dict[str, Value]:
        """A JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Point:
        """Read what `to_json` wrote."""
        return cls(**{f.name: data[f.name] for f in fields(cls)})


def shown(value: Value) -> str:
    """A value as flags take it."""
    return "none" if value is None else f"{value:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """One parameter's values, or the range that they are drawn from."""

    name: str
    kind: Kind = "choice"
    values: tuple[Value, ...] = ()
    """Of a choice."""
    low: float = math.nan
    high: float = math.nan

    @property
    def varies(self) -> bool:
        """Whether it can take two values."""
        return self.kind != "choice" or len(self.values) > 1

    def draw(self, rng: np.random.Generator) -> Value:
        """One value."""
        if self.kind == "choice":
            return self.values[int(rng.integers(len(self.values)))]
        if self.kind == "uniform":
            return float(rng.uniform(self.low, self.high))
        return float(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    """What values a dimension takes."""

    read: Callable[[str], float | int]
    none: bool = False
    ranges: bool = True
    least: float = 0.0
    above: bool = False
    """Whether the least value itself is out."""


_RULES: Final[Mapping[str, _Rule]] = {
    "omega": _Rule(read=float),
    "epsilon": _Rule(read=float, none=True, above=True),
    "split_index": _Rule(read=int, ranges=False, least=1),
    "feature_bits": _Rule(read=float, none=True, above=True),
    "seed": _Rule(read=int, ranges=False),
}
DIMENSIONS: Final = tuple(_RULES)
"""In the order in which tables show them."""
_ENCODERS: Final = ("split_index", "epsilon", "seed")
"""Dimensions that an encoder depends on."""


def parse_dimension(name: str, text: str) -> Dimension:
    """What a flag says. Raises `ConfigError`."""
    rule, flag = _RULES[name], "--" + name.replace("_", "-")
    head, colon, rest = text.strip().partition(":")
    kind = head.strip().replace("-", "") if colon else "choice"
    if kind == "choice":
        return Dimension(name=name, values=_values(rule, flag, rest if colon else text))
    if kind not in ("uniform", "loguniform"):
        raise ConfigError(f"{flag} {text!r}: no distribution named {head!r}; known: choice, uniform, loguniform")
    if not rule.ranges:
        raise ConfigError(f"{flag} takes whole numbers from a list, as 5,6,7, not a range: got {text!r}")
    ends = [_number(float, flag, end) for end in rest.split(":")]
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise ConfigError(f"{flag} {text!r}: a range is {kind}:LOW:HIGH, with LOW below HIGH")
    least = 0.0 if kind == "uniform" and not rule.above else math.nextafter(0.0, 1.0)
    if ends[0] < least:
        raise ConfigError(f"{flag} {text!r}: {'values' if least == 0 else 'the ends of this range'} must be > 0")
    return Dimension(name=name, kind="uniform" if kind == "uniform" else "loguniform", low=ends[0], high=ends[1])


def _values(rule: _Rule, flag: str, text: str) -> tuple[Value, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"{flag} names no value: the space is empty. Give values, as 1,2,4, or leave it out")
    values: list[Value] = []
    for word in words:
        if word.lower() == "none":
            if not rule.none:
                raise ConfigError(f"{flag} has no value none: give numbers")
            values.append(None)
            continue
        number = _number(rule.read, flag, word)
        if number < rule.least or (rule.above and number == rule.least):
            raise ConfigError(
                f"{flag} must be {'>' if rule.above else '>='} {rule.least:g}, got {word}"
                + ("; leave it out with none" if rule.none else "")
            )
        values.append(number)
    if len(set(values)) != len(values):
        raise ConfigError(f"{flag} {text} names a value twice: a trial is not done twice")
    return tuple(values)


def _number(read: Callable[[str], float | int], flag: str, word: str) -> float | int:
    try:
        number = read(word.strip())
    except ValueError:
        what = "a whole number" if read is int else "a number"
        raise ConfigError(f"{flag}: {word.strip()!r} is not {what}") from None
    if not math.isfinite(number):
        raise ConfigError(f"{flag}: {word.strip()} is not finite")
    return number


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """All dimensions. Those that are not swept have one value."""

    omega: Dimension
    epsilon: Dimension
    split_index: Dimension
    feature_bits: Dimension
    seed: Dimension

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """In order."""
        return tuple(getattr(self, name) for name in DIMENSIONS)

    @property
    def swept(self) -> tuple[Dimension, ...]:
        """Those that vary, seeds aside."""
        return tuple(d for d in self.dimensions if d.varies and d.name != "seed")

    @property
    def ranges(self) -> tuple[Dimension, ...]:
        """Those that are drawn from a range."""
        return tuple(d for d in self.dimensions if d.kind != "choice")

    def grid(self) -> list[Point]:
        """Every combination, those that share an encoder one after the other. Ranges have none."""
        assert not self.ranges, "a range has no grid"
        order = (*_ENCODERS, *(name for name in DIMENSIONS if name not in _ENCODERS))
        values = [getattr(self, name).values for name in order]
        return [Point(**dict(zip(order, found, strict=True))) for found in itertools.product(*values)]

    def random(self, n: int, *, seed: int) -> list[Point]:
        """``n`` configurations drawn at random, no two alike, each with every seed.

        There are fewer where the space has fewer.
        """
        rng, found = np.random.default_rng(seed), dict[tuple[Value, ...], None]()
        drawn = [d for d in self.dimensions if d.name != "seed"]
        for _ in range(100 * n):
            if len(found) == n:
                break
            found.setdefault(tuple(d.draw(rng) for d in drawn))
        names = [d.name for d in drawn]
        return [
            Point(**dict(zip(names, values, strict=True)), seed=seed)  # type: ignore[arg-type]
            for values in found
            for seed in self._seeds()
        ]

    def _seeds(self) -> Iterator[int]:
        for value in self.seed.values:
            assert isinstance(value, int)
            yield value

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {d.name: list(d.values) if d.kind == "choice" else {d.kind: [d.low, d.high]} for d in self.dimensions}
