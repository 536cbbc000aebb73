"""The root of the project's errors. The whole tree is drawn in `orchestrator/errors.py`.

It starts here, in the lowest layer, because imports run one way and a data set must be able to refuse its input.
Every error survives pickling: arguments go to ``super().__init__`` unchanged and the text is made in ``__str__``,
so that a cause raised in one actor reads the same in another.
"""

from collections.abc import Iterable


class MetaMorphosisError(Exception):
    """Anything this project raises on purpose. Commands turn it into one line and exit status 1."""

    exit_code = 1


class UserError(MetaMorphosisError):
    """What was asked for cannot be done, and the person who asked can mend it. Exit status 2."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, missing, out of range, or contradicts another."""


class DataError(UserError):
    """A data set, an image or a label is missing, corrupt or unusable."""


class UnknownNameError(UserError):
    """A name that no registry holds."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = tuple(sorted(known))
        super().__init__(kind, name, known)
        self.kind, self.name, self.known = kind, name, known

    def __str__(self) -> str:
        return f"no {self.kind} named {self.name!r}; known: {', '.join(self.known) or '(none)'}"
