"""Of ``evaluate.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.settings.shared import RuntimeSettings

_INLINE = tyro.conf.arg(name="")

EVALUATION_PARTS = ("leakage", "reconstruction", "membership", "hijack")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSettings:
    """Measure what each task's tenant can learn from its features that it did not buy, and write a report of it.

    The paper's swap test, and attackers that are trained afresh on the features, beside chance and the floor that the
    labels' own correlation sets; how well the images themselves can be got back; who was in the training set; and what
    a tenant gains that sends false gradients.
    """

    data: str | None = None
    """Where the data set is now, if not where the encoder found it."""
    encoder_version: str = "latest"
    """Which published encoder."""
    budget: Literal["quick", "full"] = "quick"
    """How hard attackers try. quick: a few kinds, once each, without hijacking, in a minute on small data; full: every
    kind, three times each, on more rows, tenants that collude included, which takes from minutes to hours."""
    parts: tuple[str, ...] = ()
    """Only these parts, as A,B,C: leakage, reconstruction, membership, hijack. Default: all of the budget."""
    attacks: tuple[str, ...] = ()
    """Only these attackers of labels, as A,B,C: linear, mlp, cnn ... Default: all of the budget."""
    decoders: tuple[str, ...] = ()
    """Only these of those that get images back, as A,B,C: decoder_8b, decoder, decoder_l1, decoder_staged, lookup,
    inversion. Default: all of the budget."""
    alone: int = 0
    """Also train each task's network alone, without any privacy, for this many epochs, and print its accuracy."""
    ceiling: int = 0
    """Also measure what could be read of each target if nothing were held back, so that weak attackers show: by the
    same attackers on the universal feature, and by a network trained on the images for this many epochs."""
    control: bool = False
    """Also let the same attackers loose on features that were dealt anew among the images with the same own label, and
    so tell nothing else: what the best of them reads there above the floor is luck. Takes as long again."""
    targets: tuple[str, ...] = ()
    """Attributes to attack, as A,B,C. Default: every task of the encoder and the private attribute."""
    seeds: int | None = None
    """Attackers are trained with this many seeds. Default: 1 for quick, 3 for full; a claim of privacy needs 3."""
    seed: int = 0
    """Of the attackers' weights and batches."""
    pictures: bool = False
    """Draw reconstructions and inputs although they may show people. Pictures of data sets without people (digits) are
    always drawn; of others only where those shown, and the terms of the data, allow it."""
    beside: tuple[str, ...] = ()
    """Folders of earlier evaluations, of other encoders on the same data, as A,B,C: the report then has curves over
    epsilon, omega and split index."""
    out: Path | None = None
    """Folder for the report, its figures and evaluation.json. Default: a new one in the storage folder."""
    runtime: Annotated[RuntimeSettings, _INLINE] = RuntimeSettings()

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in EVALUATION_PARTS:
                raise UnknownNameError("part", part, EVALUATION_PARTS)
        if len(set(self.parts)) != len(self.parts):
            raise ConfigError(f"a part is named twice in --parts {','.join(self.parts)}")
        of_leakage = self.alone or self.ceiling or self.attacks or self.control
        if self.parts and "leakage" not in self.parts and of_leakage:
            raise ConfigError("--alone, --ceiling, --control and --attacks belong to leakage: add it to --parts")
        if self.parts and "reconstruction" not in self.parts and self.decoders:
            raise ConfigError("--decoders belong to reconstruction: add it to --parts")
        if self.alone < 0 or self.ceiling < 0:
            raise ConfigError(f"--alone and --ceiling are numbers of epochs, got {self.alone} and {self.ceiling}")

    @property
    def compared(self) -> tuple[Path, ...]:
        """`beside`, as paths."""
        return tuple(Path(folder).expanduser() for folder in self.beside)

    @property
    def chosen(self) -> frozenset[str]:
        """The parts that are measured."""
        return frozenset(self.parts or EVALUATION_PARTS) - ({"hijack"} if self.budget == "quick" else set())
