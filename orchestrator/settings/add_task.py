"""Of ``add_task.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from orchestrator.assembly import SessionConfig
from orchestrator.errors import ConfigError
from orchestrator.privacy.dp import DpBudget
from orchestrator.settings.remote import RemoteSettings
from orchestrator.settings.shared import RuntimeSettings
from orchestrator.settings.task_privacy import TaskPrivacySettings

_INLINE = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True, slots=True)
class AddTaskSettings:
    """Add one task to a published encoder, without touching the tasks that are already there.

    Data set, split and networks are those of the encoder, from the catalog.
    """

    task: Annotated[str, tyro.conf.Positional]
    """The task to add."""
    data: str | None = None
    """Where the data set is now, if not where the encoder found it. The content must be the same."""
    encoder_version: str = "latest"
    """Which published encoder."""
    head: str | None = None
    """The tenant's head: backbone, linear or mlp. Default: as the tasks of that encoder, and mlp in place of backbone
    with bounded features."""
    module: str | None = None
    """The metamorphosis module. Default: as the tasks of that encoder."""
    dp: Annotated[DpBudget, _INLINE] = DpBudget()
    """With an epsilon the module is trained under DP, with a stand-in head that is thrown away, at that cost beside
    what the encoder cost. Without one, only the encoder is covered."""
    task_privacy: Annotated[TaskPrivacySettings, _INLINE] = TaskPrivacySettings()
    training: Annotated[SessionConfig, _INLINE] = SessionConfig()
    remote: Annotated[RemoteSettings, _INLINE] = RemoteSettings()
    seed: int = 0
    """Of initial weights, batches and mirroring."""
    resume: bool = False
    """Go on with the newest interrupted run of the same settings, from its newest whole checkpoint."""
    runtime: Annotated[RuntimeSettings, _INLINE] = RuntimeSettings()

    def __post_init__(self) -> None:
        if self.task_privacy.channel is None:
            return
        if self.dp.epsilon is not None:
            self.task_privacy.check_without_shaping("leave --epsilon out")
        if self.head == "backbone":
            raise ConfigError(
                "the rest of the backbone takes no bounded feature, which is a short vector: choose --head mlp or "
                "linear, or leave --head out"
            )
