"""The error tree.

MetaMorphosisError                  exit status 1
├── UserError                       exit status 2: the person who asked can mend it
│   ├── ConfigError                 a setting is unknown, missing, out of range, or contradicts another
│   ├── DataError                   a data set, an image or a label is missing, corrupt or unusable
│   ├── UnknownNameError            a name that no registry holds
│   ├── AlreadyPublishedError       the catalog already has this task for this encoder
│   ├── NotPublishedError           the catalog has no such encoder or task
│   ├── PrivacyRefusal              what was asked would break the guarantee that would be printed
│   │   ├── BudgetExceededError      the data set's privacy budget does not have what was asked for
│   │   └── BitBudgetExceededError   a tenant's bits of a task do not have room for the features asked for
│   ├── UnavailableError            a tracking server or a cluster does not answer
│   └── MissingExtraError           an optional dependency is not installed
├── DeploymentError                 a task could not be served, or no longer is as it was asked for
├── ProtocolError                   a party sent what the protocol does not allow
├── PartyLostError                  a party died or stopped answering
├── NonFiniteLossError              training diverged
├── NonFiniteFeatureError           a bounded feature is NaN or infinite
├── QuarantineError                 no task is left whose consumer may be listened to
├── AuditError                      an audit measured what contradicts the claims
├── PublishConflictError            somebody else published first
├── LedgerError                     the privacy ledger cannot be read or written, or forbids the step
└── CheckpointError                 a checkpoint is truncated, foreign or of another version
"""

from tasks.errors import ConfigError, DataError, MetaMorphosisError, UnknownNameError, UserError

__all__ = [
    "AlreadyPublishedError",
    "AuditError",
    "BitBudgetExceededError",
    "BudgetExceededError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeploymentError",
    "LedgerError",
    "MetaMorphosisError",
    "MissingExtraError",
    "NonFiniteFeatureError",
    "NonFiniteLossError",
    "NotPublishedError",
    "PartyLostError",
    "PrivacyRefusal",
    "ProtocolError",
    "PublishConflictError",
    "QuarantineError",
    "UnavailableError",
    "UnknownNameError",
    "UserError",
]


class AlreadyPublishedError(UserError):
    """The catalog already has this task for this encoder."""

    def __init__(self, task: str, encoder: str) -> None:
        super().__init__(task, encoder)
        self.task, self.encoder = task, encoder

    def __str__(self) -> str:
        return (
            f"task {self.task!r} is already published for encoder {self.encoder}; "
            "a published feature never changes: choose another task, or train a new encoder"
        )


class NotPublishedError(UserError):
    """The catalog has no such encoder or task."""


class PrivacyRefusal(UserError):  # noqa: N818 - it is a refusal, and reads as one
    """What was asked would break the guarantee that would be printed."""


class BudgetExceededError(PrivacyRefusal):
    """The data set's privacy budget does not have what was asked for."""


class BitBudgetExceededError(PrivacyRefusal):
    """A tenant's bits of a task do not have room for the features asked for. None was released, nothing was charged."""

    def __init__(self, tenant: str, task: str, asked_bits: float, left_bits: float, limit_bits: float | None) -> None:
        super().__init__(tenant, task, asked_bits, left_bits, limit_bits)
        self.tenant, self.task = tenant, task
        self.asked_bits, self.left_bits, self.limit_bits = asked_bits, left_bits, limit_bits

    def __str__(self) -> str:
        if self.limit_bits is None:
            return (
                f"tenant {self.tenant!r} has no limit of bits for task {self.task!r}, so nothing may be released: "
                "set one first"
            )
        return (
            f"tenant {self.tenant!r} asked for {self.asked_bits:g} bits of task {self.task!r}, and {self.left_bits:g} "
            f"of {self.limit_bits:g} are left; nothing was released. Ask for fewer images, for images that this "
            "tenant was given before, which are free with keyed noise, or raise the limit"
        )


class UnavailableError(UserError):
    """A tracking server or a cluster does not answer."""


class MissingExtraError(UserError):
    """An optional dependency is not installed."""

    def __init__(self, extra: str, module: str) -> None:
        super().__init__(extra, module)
        self.extra, self.module = extra, module

    def __str__(self) -> str:
        return f"this command needs {self.module}: pip install 'metamorphosis-ray[{self.extra}]'"


class DeploymentError(MetaMorphosisError):
    """A task could not be served, or is not served as it was asked for. What was served before still is."""


class ProtocolError(MetaMorphosisError):
    """A party sent what the protocol does not allow: a wrong shape, type, task or step, or NaN."""


class PartyLostError(MetaMorphosisError):
    """A party died or stopped answering."""


class NonFiniteLossError(MetaMorphosisError):
    """Training diverged: a loss or a gradient is NaN or infinite."""

    def __init__(self, task: str, step: int, loss: float) -> None:
        super().__init__(task, step, loss)
        self.task, self.step, self.loss = task, step, loss

    def __str__(self) -> str:
        return (
            f"the loss of task {self.task!r} is {self.loss} at step {self.step}; no task was published. "
            "Lower --lr or --omega, and check the images for constant or corrupt ones"
        )


class NonFiniteFeatureError(MetaMorphosisError):
    """A bounded feature is NaN or infinite, so no channel bounds what it tells: its module or its input is bad."""


class QuarantineError(MetaMorphosisError):
    """The guard has put every task of the session into quarantine."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons

    def __str__(self) -> str:
        told = "; ".join(f"{task!r}: {reason}" for task, reason in self.reasons.items())
        return (
            f"no task was published, as all are in quarantine. {told}. "
            "If these consumers can be trusted, lower --lr, or train with --no-guard"
        )


class AuditError(MetaMorphosisError):
    """More was lost than is claimed, or a planted fault was not seen."""


class PublishConflictError(MetaMorphosisError):
    """Somebody else published first, so the dissimilarity to their task has not been trained yet."""


class LedgerError(MetaMorphosisError):
    """The privacy ledger cannot be read or written, or forbids the step. The step was not taken."""


class CheckpointError(MetaMorphosisError):
    """A checkpoint is truncated, foreign or of another version."""
