"""What a published model promises, in words: the same ones in the command line, the registry, reports and endpoints.

Only what is true is said. DP-SGD protects training images from whoever gets the weights. It says nothing about an image
that is shown to the model later, and an encoder whose head was trained beside it without noise has no guarantee at all,
whatever the accountant prints. A bounded feature is the other way round: it bounds what is told of any image, and says
nothing of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from orchestrator.errors import ConfigError
from orchestrator.privacy.accounting import rounded_up
from orchestrator.privacy.bounded.channel import ChannelConfig

if TYPE_CHECKING:
    from orchestrator.privacy.accounting import Accountant
    from orchestrator.privacy.dp import DpBudget

NONE: Final = "none"
"""The mode of a model that was trained without DP."""
PAPER: Final = "encoder_only_paper"

_ALL: Final = ("encoder", "metamorphosis modules", "heads")
_PARTS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    NONE: ((), _ALL),
    "surrogate_then_freeze": (("encoder",), ("metamorphosis modules", "heads")),
    "surrogate_dp_modules": (("encoder", "metamorphosis modules"), ("heads",)),
    "whole": (_ALL, ()),
    "two_budget": (_ALL, ()),
    "public_head": (_ALL, ()),
    "frozen_head": (_ALL, ()),
    PAPER: ((), _ALL),
}
"""Mode to (covered, not covered) weights."""
COVERS_ALL: Final = frozenset(mode for mode, (_, excluded) in _PARTS.items() if not excluded)
"""Modes in which nothing that is published is left out."""

_HOW: Final[Mapping[str, str]] = {
    "surrogate_then_freeze": "The encoder was trained with a stand-in head, all under the noise; the stand-in was "
    "thrown away, and what is built on the frozen encoder afterwards changes nothing about it.",
    "surrogate_dp_modules": "Encoder and modules were trained one after the other, each time with stand-in heads under "
    "the same noise that were thrown away; epsilon is for all of it together.",
    "whole": "Encoder, modules and heads were clipped and noised as one.",
    "two_budget": "The heads were clipped and noised apart from the rest; the noise multiplier is that of one "
    "mechanism that costs as much as both together.",
    "public_head": "The heads learned from public images alone, and of the private ones know what the noisy weights "
    "say. The public images are not protected.",
    "frozen_head": "The heads stayed as they were before the first private image was seen.",
}
"""Mode to how its guarantee comes about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guarantee:
    """What is known about the privacy of one published model. Goes with it wherever it goes."""

    mode: str
    """``none``, or one of the modes of `orchestrator.privacy.dp.DpConfig`."""
    n_train: int
    """Training images."""
    covers: tuple[str, ...] = ()
    """Which weights the guarantee is for; nothing where there is none."""
    excludes: tuple[str, ...] = ()
    """Which published weights it is not for."""
    epsilon: float | None = None
    """Guaranteed; None where nothing is."""
    nominal_epsilon: float | None = None
    """What the accountant counted in a mode that guarantees nothing. Never to be called a guarantee."""
    delta: float | None = None
    unit: str = "image"
    """Neighbouring data sets differ by one of these, added or removed."""
    accountant: str | None = None
    noise_multiplier: float | None = None
    """Standard deviation of the noise over the clipping norm; None if it varied."""
    sample_rate: float | None = None
    """Probability with which each image entered a batch; None if it varied."""
    steps: int = 0
    """Private steps taken."""
    mechanisms: tuple[tuple[float, float, int], ...] = ()
    """All that epsilon is composed of: runs of (noise multiplier, sample rate, steps)."""
    max_grad_norm: float | None = None
    reproducible_noise: bool = False
    """Whether the noise came from a fixed seed."""
    task_privacy: str = ""
    """How tasks are kept from one another, e.g. ``ssim, omega 0.001``; empty if nothing was done."""
    channel: ChannelConfig | None = None
    """Of the task's feature; None where nothing bounds it, and for an encoder."""
    epochs: int | None = None
    """In which a bounded task's tenant was sent the training images, with other noise each time."""
    noise_kind: str | None = None
    """Of what is released of a bounded task: one of `NOISE_KINDS`; None, in older statements, is keyed."""
    chosen_from: int | None = None
    """Of how many trained models this is the best by what private validation images say; None where none was chosen."""

    def __post_init__(self) -> None:
        if self.mode not in _PARTS:
            raise ConfigError(f"no guarantee mode named {self.mode!r}; known: {', '.join(sorted(_PARTS))}")
        numbers = (self.epsilon, self.nominal_epsilon, self.delta, self.noise_multiplier, self.sample_rate)
        if not all(number is None or math.isfinite(number) for number in numbers):
            raise ConfigError(f"a guarantee holds a number that is not finite: {numbers}")
        if (self.epsilon is not None) != bool(self.covers):
            raise ConfigError(f"epsilon {self.epsilon} is claimed for {', '.join(self.covers) or 'nothing'}")
        if (self.epsilon is not None) == (self.mode in (NONE, PAPER)):
            raise ConfigError(f"mode {self.mode!r} does not go with a guaranteed epsilon of {self.epsilon}")
        if (self.channel is None) != (self.epochs is None):
            raise ConfigError("a bounded feature comes with the epochs in which it was trained, and no other does")
        if self.noise_kind is not None and (self.channel is None or self.noise_kind not in NOISE_KINDS):
            raise ConfigError(f"the noise of a bounded feature is {' or '.join(NOISE_KINDS)}, got {self.noise_kind!r}")
        if (self.epsilon is not None or self.nominal_epsilon is not None) and self.delta is None:
            raise ConfigError("an epsilon without its delta means nothing")

    def short(self) -> str:
        """One line, for tables."""
        return self._short_of_weights() + ("" if self.channel is None else f"; features of at most {self._bits} bits")

    def _short_of_weights(self) -> str:
        if self.epsilon is not None:
            budget = f"epsilon {rounded_up(self.epsilon)} at delta {self.delta:g}"
            return f"{budget} per {self.unit}, for {_listed(self.covers)}"
        if self.mode == PAPER:
            return f"none (the head is not private); nominal epsilon {_number(self.nominal_epsilon)}"
        return "none: trained without differential privacy"

    def statement(self) -> str:
        """A short paragraph: what is covered, what is not."""
        return " ".join((*self._claim(), *self._limits(), *self._bounded(), self._task_privacy(), *self._choice()))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        lists = {name: list(getattr(self, name)) for name in ("covers", "excludes")}
        found = {**asdict(self), **lists, "mechanisms": [list(run) for run in self.mechanisms]}
        return {name: value for name, value in found.items() if name not in _LATER or value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Guarantee:
        """Read what `to_json` wrote, now or before features could be bounded.

        A missing, unknown or ill-typed key is a `ConfigError`.
        """
        data = {**dict.fromkeys(_LATER), **data}
        known = {f.name for f in fields(cls)}
        if difference := known ^ set(data):
            raise ConfigError(f"a guarantee has unknown or missing keys: {', '.join(sorted(difference))}")
        for name, (kinds, what) in _JSON_KINDS.items():
            # JSON's true is no number here, though Python's is an int.
            if not isinstance(data[name], kinds) or (isinstance(data[name], bool) and bool not in kinds):
                raise ConfigError(f"{name} of a guarantee must be {what}, got {data[name]!r}")
        if not all(isinstance(part, str) for part in (*data["covers"], *data["excludes"])):
            raise ConfigError("covers and excludes of a guarantee must hold text")
        return cls(
            **{
                **data,
                "covers": tuple(data["covers"]),
                "excludes": tuple(data["excludes"]),
                "mechanisms": _mechanisms(data["mechanisms"]),
                "channel": None if data["channel"] is None else ChannelConfig.from_json(data["channel"]),
            }
        )

    def _claim(self) -> list[str]:
        if self.epsilon is None and self.mode == PAPER:
            return [
                "Guarantee: none (the head is not private).",
                "The encoder was trained with clipped and noised gradients, but together with heads that were trained "
                "without noise. These carry what the noise was to hide, so the accounted epsilon of "
                f"{_number(self.nominal_epsilon)} at delta {_number(self.delta)} is nominal and no guarantee.",
            ]
        if self.epsilon is None:
            subject = "Guarantee" if self.channel is None else "Guarantee for the weights"
            return [f"{subject}: none: trained without differential privacy."]
        return [
            f"Guarantee: ({rounded_up(self.epsilon)}, {self.delta:g})-differential privacy for the weights of "
            f"{_listed(self.covers)}. Whether any one of the {self.n_train} training {self.unit}s, with its labels, "
            "was used changes the probability of any outcome by a factor of at most exp(epsilon), but for delta.",
            _HOW[self.mode],
            f"Accounted by {self.accountant}: {self._mechanism()}, clipping norm {_number(self.max_grad_norm)}.",
            f"The unit is one {self.unit}, not one person: whoever appears in several is protected less.",
        ]

    def _mechanism(self) -> str:
        runs = self.mechanisms or ((self.noise_multiplier, self.sample_rate, self.steps),)
        return " and then ".join(
            f"{steps} steps, noise multiplier {_number(sigma)}, sample rate {_number(rate)}"
            for sigma, rate, steps in runs
        )

    def _limits(self) -> list[str]:
        limits = ["It promises nothing about an image that the model is shown later: its feature may be inverted."]
        if self.channel is not None:
            limits = ["It promises nothing about an image that the model is shown later; the bound on features does."]
        if self.epsilon is None and self.channel is not None:
            return ["Nothing is promised about what the weights tell of training images."]
        if self.epsilon is None:
            return ["Nothing is promised about training images, nor about an image that the model is shown later."]
        if self.excludes:
            limits.append(f"Not covered: the weights of {_listed(self.excludes)}.")
        limits.append(
            "Not covered either: labels and training features, which tenants receive, and choices made by looking at "
            "results (best epoch, early stopping, settings tried)."
        )
        if self.delta is not None and self.delta * self.n_train >= 1:
            limits.append(
                f"This delta is not below 1 / {self.n_train}: it permits publishing a training {self.unit} outright."
            )
        if self.reproducible_noise:
            limits.append(
                "The noise came from a fixed seed: whoever knows it can take the noise off again, so the guarantee "
                "holds only towards those who do not."
            )
        return limits

    def _choice(self) -> list[str]:
        if self.chosen_from is None:
            return []
        return [
            f"It was chosen from {self.chosen_from} trained models by looking at private validation images. That "
            "choice tells something of these images, and no epsilon covers it; the other trainings were charged to "
            "the privacy ledger, and are not in the epsilon of this one."
        ]

    @property
    def _bits(self) -> str:
        assert self.channel is not None
        return rounded_up(self.channel.bits_per_image)

    def _bounded(self) -> list[str]:
        if self.channel is None:
            return []
        from orchestrator.privacy.bounded.bounds import local_dp_epsilon

        epsilon = local_dp_epsilon(self.channel, LOCAL_DELTA)
        return [
            f"Each feature of this task carries at most {self._bits} bits about its image, whatever the attacker "
            f"knows or computes: it is {self._numbers}, and that is the capacity of such a channel.",
            self._asked_again,
            "Features of several images of the same person add up, and so do those of several tasks or versions of one "
            "image.",
            f"In training its tenant was sent each training and validation image {self.epochs} times, once an epoch "
            "and each time with other noise: for these images the bound is so many times as large, and once more for "
            "what is published.",
            f"The same noise is ({rounded_up(epsilon)}, {LOCAL_DELTA:g})-local differential privacy for any two "
            "images; the bits are the useful bound.",
            "This holds as long as the producer's noise key is secret, and says nothing of what the weights tell.",
        ]

    @property
    def _asked_again(self) -> str:
        if self.noise_kind == "fresh":
            return (
                f"Every release has noise of its own: whoever asks n times for the same image is told up to n times "
                f"{self._bits} bits, each of which is charged."
            )
        return "Asking again for the same image gives the same noise, and tells nothing new."

    @property
    def _numbers(self) -> str:
        assert self.channel is not None
        d, tau, cells = self.channel.dimensions, self.channel.noise, self.channel.cells
        vector = f"{d} numbers of mean square 1 under Gaussian noise of standard deviation {tau:.4g}"
        if cells == 1:
            return vector
        per_cell = rounded_up(self.channel.bits_per_cell)
        return f"a map of {cells} cells of at most {per_cell} bits each, every one {vector}"

    def _task_privacy(self) -> str:
        if not self.task_privacy and self.channel is not None:
            return "Privacy between tasks: by that bound alone."
        if not self.task_privacy:
            return "Privacy between tasks: none was trained."
        if self.channel is not None:
            return (
                f"Privacy between tasks: by that bound; what was trained beside it ({self.task_privacy}) promises "
                "nothing, and is measured, see evaluate."
            )
        return f"Privacy between tasks ({self.task_privacy}): no guarantee: measured, see evaluate."


LOCAL_DELTA: Final = 1e-5
"""At which the local differential privacy of a bounded feature is stated."""
NOISE_KINDS: Final = ("keyed", "fresh")
"""keyed: a function of the image, so that asking again tells nothing new; fresh: another draw for each release."""
_LATER: Final = ("channel", "epochs", "noise_kind", "chosen_from")
"""Keys that statements of other models do not have, nor those that were published before there was such a thing."""
_NUMBER: Final = ((float, int), "a number")
_MAYBE: Final = ((float, int, type(None)), "a number or null")
_TEXT: Final = ((str,), "text")
_LIST: Final = ((list, tuple), "a list")
_JSON_KINDS: Final[Mapping[str, tuple[tuple[type, ...], str]]] = {
    "mode": _TEXT,
    "n_train": ((int,), "a whole number"),
    "covers": _LIST,
    "excludes": _LIST,
    "epsilon": _MAYBE,
    "nominal_epsilon": _MAYBE,
    "delta": _MAYBE,
    "unit": _TEXT,
    "accountant": ((str, type(None)), "text or null"),
    "noise_multiplier": _MAYBE,
    "sample_rate": _MAYBE,
    "steps": ((int,), "a whole number"),
    "mechanisms": _LIST,
    "max_grad_norm": _MAYBE,
    "reproducible_noise": ((bool,), "true or false"),
    "task_privacy": _TEXT,
    "channel": ((Mapping, type(None)), "an object or null"),
    "epochs": ((int, type(None)), "a whole number or null"),
    "noise_kind": ((str, type(None)), "text or null"),
    "chosen_from": ((int, type(None)), "a whole number or null"),
}


def guarantee_for(
    config: DpBudget,
    *,
    accountant: Accountant | None,
    n_train: int,
    task_privacy: str = "",
    mode: str | None = None,
    covers: tuple[str, ...] | None = None,
    excludes: tuple[str, ...] | None = None,
) -> Guarantee:
    """The guarantee of a training that is over, from what its accountant really counted.

    ``mode`` is the configuration's own unless given; ``covers`` and ``excludes`` name weights in place of the mode's
    usual ones. With ``prv`` this takes up to seconds. Raises `ConfigError` where ``config`` asked for DP and nothing
    was accounted.
    """
    if config.epsilon is None:
        usual = _PARTS[NONE][1]
        return Guarantee(
            mode=NONE, n_train=n_train, excludes=usual if excludes is None else excludes, task_privacy=task_privacy
        )
    if accountant is None or accountant.steps == 0:
        raise ConfigError(f"a training with epsilon {config.epsilon} was asked for, but no private step was accounted")
    mode = mode or config.mode
    delta = config.delta_for(n_train)
    spent = accountant.epsilon(delta)
    private = mode != PAPER
    noise_multiplier, sample_rate, _ = accountant.history[0]
    one_run = len(accountant.history) == 1
    usual_covers, usual_excludes = _PARTS[mode]
    return Guarantee(
        mode=mode,
        n_train=n_train,
        covers=usual_covers if covers is None else covers,
        excludes=usual_excludes if excludes is None else excludes,
        epsilon=spent if private else None,
        nominal_epsilon=None if private else spent,
        delta=delta,
        accountant=accountant.kind,
        noise_multiplier=noise_multiplier if one_run else None,
        sample_rate=sample_rate if one_run else None,
        steps=accountant.steps,
        mechanisms=accountant.history,
        max_grad_norm=config.max_grad_norm,
        reproducible_noise=config.noise_seed is not None,
        task_privacy=task_privacy,
    )


def _mechanisms(runs: Any) -> tuple[tuple[float, float, int], ...]:
    try:
        return tuple((float(sigma), float(rate), int(steps)) for sigma, rate, steps in runs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"mechanisms of a guarantee must be (noise, rate, steps) each, got {runs!r}") from error


def _listed(words: tuple[str, ...]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else "nothing"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
