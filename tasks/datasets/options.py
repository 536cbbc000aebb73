"""What a user may choose about a data set."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetOptions:
    """How a data set is read. What does not fit the data set is refused by it."""

    flip: bool | None = None
    """Whether training may mirror images; None is the data set's own default."""
    group_by: str | None = None
    """Column whose values keep rows together in one subset (a person, a driver); None groups nothing."""
    skip_corrupt: bool = False
    """Leave out rows whose image cannot be read, and name them, instead of refusing the data set."""
    columns: tuple[str, ...] = ()
    """Label columns to offer as tasks; () offers all that can be."""


DEFAULT_OPTIONS = DatasetOptions()
