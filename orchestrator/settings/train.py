"""Of ``train.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Literal

import tyro

from orchestrator.assembly import SessionConfig
from orchestrator.encoder_training import CUT_BEFORE_HEAD, EncoderTrainingConfig
from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.network import NetworkConfig
from orchestrator.privacy.dp import DpConfig
from orchestrator.privacy.guarantee import COVERS_ALL
from orchestrator.settings.remote import RemoteSettings
from orchestrator.settings.shared import DataSettings, RuntimeSettings
from orchestrator.settings.task_privacy import TaskPrivacySettings

NOISY_HEADS: Final = COVERS_ALL - CUT_BEFORE_HEAD
"""Modes in which heads learn under the noise, so that phase 1 of --algorithm input trains every task."""

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
    remote: Annotated[RemoteSettings, _INLINE] = RemoteSettings()
    remote_tasks: tuple[str, ...] = ()
    """With --remote: the tasks, as A,B,C, whose tenants train elsewhere; the others are hosted. Default: all of
    --tasks."""
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
        self._check_remote()
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

    @property
    def wholly_private(self) -> bool:
        """Whether encoder, modules and heads of all tasks are trained at once, under the noise."""
        return self.algorithm == "input" and self.dp.dp_mode in NOISY_HEADS

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """The tasks whose tenants train their heads in processes of their own."""
        if self.remote.remote is None:
            return ()
        return self.remote_tasks or self.tasks

    def _check_remote(self) -> None:
        """Raise `ConfigError` where a tenant elsewhere would have nothing to train, or was not sold anything."""
        if self.remote_tasks and self.remote.remote is None:
            raise ConfigError("--remote-tasks are waited for at an address: give --remote HOST:PORT, or leave them out")
        for task in self.remote_tasks:
            if task not in self.tasks:
                raise UnknownNameError("task of --tasks", task, self.tasks)
        if self.remote.remote is None:
            return
        if self.phase == "encoder":
            raise ConfigError("--phase encoder trains no tenant's head: leave --remote out")
        if self.wholly_private:
            raise ConfigError(
                f"--algorithm input with --dp-mode {self.dp.dp_mode} trains the heads at the producer: leave --remote "
                "out"
            )
