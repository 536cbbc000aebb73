"""What every run begins with: its data, checked against what was asked, and its parties."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Never

import numpy as np
from numpy.typing import NDArray

from orchestrator.assembly import SessionPlan, TrainingData
from orchestrator.consumer import ConsumerConfig
from orchestrator.errors import ConfigError, DataError, PrivacyRefusal
from orchestrator.ports import ConsumerPort, ProducerPort
from orchestrator.runs.observer import RunObserver
from orchestrator.settings.shared import DataSettings, RuntimeSettings
from orchestrator.shaping import Secret
from orchestrator.wire import TaskOffer
from tasks.datasets import open_dataset
from tasks.datasets.splits import SUBSETS, Splits, check_labels, split_rows
from tasks.datasets.table import ImageTable


@dataclass(frozen=True, kw_only=True)
class OpenData:
    """A data set and its split."""

    table: ImageTable
    splits: Splits

    def training_data(self, tasks: Sequence[str]) -> TrainingData:
        """The part that some tasks need. Raises if one is unknown or lacks a class in the training subset."""
        check_labels(self.table, self.splits, tuple(tasks))
        rows = {subset: self.splits.subset(subset) for subset in SUBSETS}
        return TrainingData.of(self.table, rows, tuple(tasks))

    def secrets(self, names: Sequence[str]) -> dict[str, Secret]:
        """The training labels of attributes that features are not to tell.

        Raises if one is unknown, lacks a class in the training subset, or is a map.
        """
        check_labels(self.table, self.splits, tuple(names))
        if dense := [name for name in names if self.table.spec(name).dense]:
            raise ConfigError(f"{', '.join(dense)} is a map, and adversaries read classes: take it out of the secrets")
        return {
            name: Secret(
                labels=self.table.task_labels(name)[self.splits.train], n_classes=self.table.spec(name).n_labels
            )
            for name in names
        }


def open_data(settings: DataSettings, observer: RunObserver, *, fingerprint: str | None = None) -> OpenData:
    """Load and split. With a fingerprint, the content must be what an encoder was trained on."""
    observer.on_stage("reading the data")
    table = open_dataset(settings.data, image_size=settings.image_size, options=settings.options)
    if table.skipped:
        some = ", ".join(table.skipped[:5]) + (", ..." if len(table.skipped) > 5 else "")
        observer.on_stage(f"left out {len(table.skipped)} image(s) that cannot be read: {some}")
    if fingerprint is not None and table.fingerprint != fingerprint:
        raise DataError(
            f"{settings.data} is not the data that the encoder was trained on (its content has fingerprint "
            f"{table.fingerprint[:12]}, the encoder's {fingerprint[:12]}): the split would mix train and test images. "
            "Give the original with --data, or train a new encoder"
        )
    splits = split_rows(len(table), seed=settings.split_seed, fractions=settings.fractions, groups=table.groups)
    return OpenData(table=table, splits=splits)


def open_public(source: str, opened: OpenData, tasks: Sequence[str], settings: DataSettings) -> TrainingData:
    """Public images for the heads of ``tasks``, as the private ones are read. Raises if one of them is private."""
    table, private = open_dataset(source, image_size=settings.image_size, options=settings.options), opened.table
    for task in tasks:
        theirs, ours = table.spec(task).classes, private.spec(task).classes
        if theirs != ours:
            raise DataError(f"{task!r} has the classes {', '.join(theirs)} in {source}, not {', '.join(ours)}")
    if shared := {_pixels(image) for image in table.images} & {_pixels(image) for image in private.images}:
        raise PrivacyRefusal(
            f"{len(shared)} image(s) of {source} are in {settings.data} too: what is private cannot be public. "
            "Take them out of one of the two"
        )
    public = TrainingData.of(table, {"train": np.arange(len(table))}, tuple(tasks))
    return dataclasses.replace(public, normalisation=private.normalisation, flip=private.flip)


def _pixels(image: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


OpenConsumer = Callable[[TaskOffer, ConsumerConfig], ConsumerPort]
RemoteTenant = Callable[[str], OpenConsumer]
"""From the name of a run, which is the same after a restart, to what opens its consumer of a tenant elsewhere."""
NOBODY: Final[Mapping[str, Never]] = MappingProxyType({})
"""Of whom a session asks nothing over the network."""


@contextmanager
def open_parties(
    plan: SessionPlan, runtime: RuntimeSettings, *, remote: Mapping[str, OpenConsumer] = NOBODY
) -> Iterator[tuple[ProducerPort, list[ConsumerPort]]]:
    """The producer and one consumer a task, hosted in this process or as actors; ended with the block.

    ``remote`` has what opens the consumer of a task whose tenant is elsewhere.
    """
    tasks = list(plan.data.specs)
    opened: list[ProducerPort | ConsumerPort] = []
    try:
        producer, open_consumer = _factories(plan, runtime, n_tasks=len(tasks))
        opened.append(producer)
        offers = producer.offers()
        consumers = []
        for task in tasks:
            consumers.append(remote.get(task, open_consumer)(offers[task], plan.consumer_config(task)))
            opened.append(consumers[-1])
        yield producer, consumers
    finally:
        for party in opened:
            party.close()


def _factories(plan: SessionPlan, runtime: RuntimeSettings, *, n_tasks: int) -> tuple[ProducerPort, OpenConsumer]:
    """The producer, and what makes a consumer of the same kind."""
    if runtime.engine == "process":
        from orchestrator.local import LocalConsumer, LocalProducer

        return LocalProducer(plan), lambda offer, config: LocalConsumer(offer, config, device=plan.device)
    from orchestrator.actors import RayConsumer, RayProducer
    from orchestrator.cluster import cluster_cpus

    threads = runtime.threads or max(1, int(cluster_cpus()) // n_tasks)

    def open_consumer(offer: TaskOffer, config: ConsumerConfig) -> ConsumerPort:
        return RayConsumer(offer, config, device=plan.device, threads=threads, parties=1 + n_tasks)

    return RayProducer(plan), open_consumer
