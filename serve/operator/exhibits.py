"""What is served, loaded for looking at: each version's networks with the tenant's head where that is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orchestrator.catalog import Catalog
from orchestrator.catalog_records import EncoderRecord, TaskRecord
from orchestrator.consumer import rebuild_head
from orchestrator.errors import CheckpointError, MetaMorphosisError, NotPublishedError
from orchestrator.network import freeze
from serve.arguments import CatalogArgs, TaskArgs, VersionArgs
from serve.model import EncoderModel, ModuleModel
from tasks.spec import TaskSpec

EncoderKey = tuple[str, str, str]
"""Tracking URI, catalog, version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedEncoder:
    """One encoder."""

    record: EncoderRecord
    model: EncoderModel = field(repr=False)

    @property
    def data_set(self) -> str:
        """Name of the data that it was trained on."""
        return str(self.record.data["name"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Exhibit:
    """One version of a task."""

    name: str
    """The task; with the version where several of one task are served."""
    spec: TaskSpec
    encoder: EncoderKey
    module: ModuleModel = field(repr=False)
    head: nn.Module | None = field(repr=False)
    """None where the tenant keeps it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its feature."""
        return self.module.card.feature_shape

    def answer(self, z_CHW: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Probabilities of its classes on a feature, its own or another's; None without a head, or for a shape that
        the head does not take."""
        if self.head is None or z_CHW.shape != self.shape:
            return None
        with torch.inference_mode():
            logits = self.head(torch.from_numpy(z_CHW[None].copy()))[0]
        found: NDArray[np.float32] = logits.softmax(dim=0).numpy()
        return found


class Records:
    """What the catalog says, read once: what is published never changes."""

    def __init__(self) -> None:
        self._encoders: dict[EncoderKey, EncoderRecord] = {}
        self._tasks: dict[tuple[EncoderKey, str], TaskRecord] = {}

    def of(self, source: CatalogArgs, version: VersionArgs, task: str) -> tuple[EncoderRecord, TaskRecord]:
        """Raises `UnavailableError`, `CheckpointError`, and `NotPublishedError`."""
        key = encoder_key(source, version)
        if (key, task) not in self._tasks:
            catalog = Catalog(source.tracking_uri, source.catalog)
            self._encoders[key] = catalog.encoder(version.encoder_version)[0]
            found = catalog.tasks(version.encoder_version)
            if task not in found:
                raise NotPublishedError(f"task {task!r} is not in the catalog any more")
            self._tasks[key, task] = found[task]
        return self._encoders[key], self._tasks[key, task]


class Gallery:
    """Networks of what is served. What is served no more is let go. Used by one thread at a time."""

    def __init__(self) -> None:
        self._encoders: dict[EncoderKey, LoadedEncoder] = {}
        self._exhibits: dict[tuple[EncoderKey, str], Exhibit] = {}

    def open(self, served: Mapping[str, TaskArgs]) -> tuple[list[Exhibit], dict[EncoderKey, LoadedEncoder], list[str]]:
        """Every version that is served, its encoders, and a sentence for each one that cannot be loaded."""
        exhibits, encoders, faults = list[Exhibit](), dict[EncoderKey, LoadedEncoder](), list[str]()
        known: dict[tuple[EncoderKey, str], Exhibit] = {}
        for task, args in served.items():
            for version in args.versions():
                key = encoder_key(args.source, version)
                try:
                    encoders[key] = self._encoders[key] = self._encoder(key, args.source, version)
                    exhibit = self._exhibits.get((key, task)) or _load(key, args, version)
                except MetaMorphosisError as error:
                    faults.append(f"Task {task}, version {version.version}: {error}")
                    continue
                known[key, task] = exhibit
                name = task if args.canary is None else f"{task} {version.version}"
                exhibits.append(replace(exhibit, name=name))
        self._encoders, self._exhibits = encoders, known
        return exhibits, encoders, faults

    def _encoder(self, key: EncoderKey, source: CatalogArgs, version: VersionArgs) -> LoadedEncoder:
        if key in self._encoders:
            return self._encoders[key]
        catalog = Catalog(source.tracking_uri, source.catalog)
        return LoadedEncoder(
            record=catalog.encoder(version.encoder_version)[0],
            model=EncoderModel.load(catalog, version.encoder_version, device="cpu"),
        )


def encoder_key(source: CatalogArgs, version: VersionArgs) -> EncoderKey:
    """Of the encoder behind a version."""
    return source.tracking_uri, source.catalog, version.encoder_version


def _load(key: EncoderKey, args: TaskArgs, version: VersionArgs) -> Exhibit:
    source, task = args.source, args.task
    catalog = Catalog(source.tracking_uri, source.catalog)
    module = ModuleModel.load(catalog, version.encoder_version, task, storage=Path(source.storage), device="cpu")
    if module.card.version != version.version:
        raise CheckpointError(f"the catalog has {module.card.version}")
    record, _, state = catalog.load_task(version.encoder_version, task)
    head = None
    if state is not None and record.head_config is not None:
        head = freeze(rebuild_head(dict(record.head_config), dict(state)))
    return Exhibit(
        name=task,
        spec=record.spec,
        encoder=key,
        module=module,
        head=head,
    )
