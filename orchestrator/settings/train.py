"""Of ``train.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from orchestrator.assembly import SessionConfig
from orchestrator.encoder_training import EncoderTrainingConfig
from orchestrator.errors import ConfigError
from orchestrator.network import NetworkConfig
from orchestrator.privacy.dp import DpConfig
from orchestrator.settings.shared import DataSettings, RuntimeSettings
from orchestrator.settings.task_privacy import TaskPrivacySettings

_INLINE = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """Train a private encoder (phase 1) and the tasks behind it (phase 2), and publish both.

    The producer keeps the images. Every task's tenant gets the features of its own task and nothing else.
    """

    data: Annotated[DataSettings, _INLINE] = DataSettings()
    private: str | None = None
    """The attribute to hide. Its module and classifier never leave the producer; no tenant can buy it."""
    tasks: tuple[str, ...] = ()
    """Tasks to train in parallel, as A,B,C."""
    algorithm: Literal["both", "task", "input"] = "both"
    """Algorithm 2's branch. both: input obfuscation, then task privacy against the frozen encoder; task: task privacy
    only, no DP, the encoder is trained jointly; input: input obfuscation only, no dissimilarity term."""
    phase: Literal["all", "encoder", "tasks"] = "all"
    """Run both phases, only phase 1 (publishes an encoder), or only phase 2 (on a published encoder)."""
    encoder_version: str = "latest"
    """Which published encoder to use with --phase tasks."""
    network: Annotated[NetworkConfig, _INLINE] = NetworkConfig()
    dp: Annotated[DpConfig, _INLINE] = DpConfig()
    task_privacy: Annotated[TaskPrivacySettings, _INLINE] = TaskPrivacySettings()
    encoder: EncoderTrainingConfig = EncoderTrainingConfig()
    training: Annotated[SessionConfig, _INLINE] = SessionConfig()
    seed: int = 0
    """Of initial weights, batches and mirroring. DP's noise comes from the operating system (see --noise-seed)."""
    resume: bool = False
    """Go on with the newest interrupted run of the same settings, from its newest whole checkpoint."""
    runtime: Annotated[RuntimeSettings, _INLINE] = RuntimeSettings()

    def __post_init__(self) -> None:
        if len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"a task is named twice in --tasks {','.join(self.tasks)}")
        if self.private is not None and self.private in self.tasks:
            raise ConfigError(
                f"{self.private!r} is the private attribute and also in --tasks: "
                "an attribute is either hidden or sold; take it out of one of the two"
            )
        if self.phase != "tasks":  # otherwise the encoder is a published one
            _ = self.task_privacy.network(self.network).task_shape(self.data.image_size)  # or cells do not fit
        if not self.tasks and self.phase != "encoder":
            raise ConfigError(
                "no task to train: name at least one with --tasks, or train only the encoder: --phase encoder"
            )
        if self.algorithm == "both" and self.private is None and self.phase != "tasks":
            raise ConfigError(
                "--algorithm both trains the encoder on a private attribute: name it with --private, "
                "or choose --algorithm task (no DP) or --algorithm input"
            )
        if self.algorithm == "task" and self.dp.epsilon is not None:
            raise ConfigError(
                "--algorithm task trains the encoder without differential privacy: leave --epsilon out, "
                "or choose --algorithm both"
            )
        if self.algorithm == "task" and self.phase != "all":
            raise ConfigError("--algorithm task trains encoder and tasks together: leave --phase out")
        if self.dp.epsilon is None and self.dp.dp_mode not in {"surrogate_then_freeze", "encoder_only_paper"}:
            raise ConfigError(f"--dp-mode {self.dp.dp_mode} trains with differential privacy: give --epsilon")
        if self.algorithm == "input" and self.dp.epsilon is None:
            raise ConfigError("--algorithm input obfuscates with differential privacy: give --epsilon")
        if self.dp.dp_mode == "surrogate_dp_modules":
            self.task_privacy.check_without_shaping("choose another --dp-mode")
        if self.algorithm == "input" and self.task_privacy.channel is not None:
            raise ConfigError("--algorithm input has no privacy between tasks: choose --algorithm both or task")
        if self.algorithm == "input" and self.task_privacy.dissimilarity.omega > 0:
            raise ConfigError("--algorithm input has no dissimilarity term: give --omega 0, or choose --algorithm both")
