"""What the catalog knows about a published encoder and a published task. All of it is JSON but for the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from orchestrator.errors import CheckpointError
from tasks.spec import TaskSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderRecord:
    """One published encoder: enough to build it, and to find the same split of the same data again."""

    version: str = ""
    """Given by the catalog: ``1``, ``2``, ..."""
    backbone: str
    split_index: int
    image_size: int
    feature_shape: tuple[int, int, int]
    """(C, H, W) of E(x)."""
    data_fingerprint: str
    """Of the content that it was trained on; see `tasks.datasets.table.ImageTable`."""
    normalisation: Mapping[str, Any]
    """``mean`` and ``std`` of `tasks.datasets.table.Normalisation`."""
    flip: bool
    data: Mapping[str, Any]
    """Data settings and whatever else a later command needs in order to go on from here."""
    guarantee: Mapping[str, Any] = field(repr=False)
    """See `orchestrator.privacy.guarantee.Guarantee.from_json`."""
    weights_sha256: str = ""
    """Of the weights file. Given by the catalog."""
    run_id: str
    """The MLflow run that trained it."""
    created: str = ""
    """UTC, ISO 8601. Given by the catalog."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        return {**_plain(self), "feature_shape": list(self.feature_shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EncoderRecord:
        """Read what `to_json` wrote. A missing or unknown key is a `CheckpointError`."""
        known = _checked(cls, data)
        channels, height, width = known["feature_shape"]
        return cls(**{**known, "feature_shape": (channels, height, width)})


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRecord:
    """One published task. It never changes."""

    spec: TaskSpec
    private: bool
    """Hidden: its feature is for nobody, and exists so that the others can be kept apart from it."""
    encoder_version: str
    version: str
    """``<encoder version>.<number of the publication>``."""
    module_config: Mapping[str, Any] = field(repr=False)
    head_config: Mapping[str, Any] | None = field(repr=False)
    """None where the tenant keeps its head to itself."""
    module_sha256: str
    head_sha256: str | None
    metrics: Mapping[str, float]
    """On the test subset; NaN where a metric is not defined."""
    guarantee: Mapping[str, Any] = field(repr=False)
    guarantee_text: str = field(repr=False)
    """The statement as it was made at publication."""
    run_id: str
    """The MLflow run that trained it."""
    created: str
    """UTC, ISO 8601."""
    dissimilarity: Mapping[str, Any] | None = None
    """How the task was kept apart from the others: `orchestrator.privacy.dissimilarity.DissimilarityConfig` as a
    mapping. None in records that were written before it was kept."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        metrics = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        return {**_plain(self), "spec": self.spec.to_json(), "metrics": metrics}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskRecord:
        """Read what `to_json` wrote. A missing or unknown key is a `CheckpointError`."""
        known = _checked(cls, data)
        metrics = {name: math.nan if value is None else float(value) for name, value in known["metrics"].items()}
        return cls(**{**known, "spec": TaskSpec.from_json(known["spec"]), "metrics": metrics})


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskEntry:
    """What is handed to the catalog in order to publish a task."""

    spec: TaskSpec
    private: bool = False
    module_config: Mapping[str, Any]
    module_state: Mapping[str, Tensor] = field(repr=False)
    head_config: Mapping[str, Any] | None = None
    head_state: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """None, as its configuration, where the tenant keeps its head to itself."""
    metrics: Mapping[str, float]
    guarantee: Mapping[str, Any]
    dissimilarity: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        assert (self.head_config is None) == (self.head_state is None), "a head has a configuration and weights"


def _plain(record: EncoderRecord | TaskRecord) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _checked(cls: type[EncoderRecord | TaskRecord], data: Mapping[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(cls)}
    if cls is TaskRecord:
        data = {"dissimilarity": None, **data}
    if difference := known ^ set(data):
        raise CheckpointError(
            f"a published {cls.__name__} has unknown or missing keys ({', '.join(sorted(difference))}): "
            "it was written by another version of this program"
        )
    return dict(data)
