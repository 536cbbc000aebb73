"""What can go wrong at the edge. These are leaves of the tree in `orchestrator/errors.py`, whose root is light."""

from __future__ import annotations

from tasks.errors import DataError, MetaMorphosisError, UserError

__all__ = ["AnswerError", "HeadError", "NotServedError", "RefusedError", "UnreachableError", "VersionMismatchError"]


class RefusedError(UserError):
    """The server knows no such token, or it is expired or revoked (401), or what was granted is used up (403)."""


class NotServedError(UserError):
    """The server has no such task, or does not say so to this token (404)."""


class UnreachableError(MetaMorphosisError):
    """The server did not answer, or was too busy, for as long as the client was told to try."""


class AnswerError(MetaMorphosisError):
    """The server's answer is not what the protocol says."""


class HeadError(DataError):
    """The head's file is missing, damaged, or no head that this project exported."""


class VersionMismatchError(UserError):
    """The features are of another version than the head was trained on: its answers would mean nothing."""

    def __init__(self, task: str, head: str, feature: str) -> None:
        super().__init__(task, head, feature)
        self.task, self.head, self.feature = task, head, feature

    def __str__(self) -> str:
        return (
            f"the head is for version {self.head} of task {self.task!r}, and the server gives version {self.feature}: "
            "export the head of that version, or ask for the version of the head"
        )
