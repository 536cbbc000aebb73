"""The catalog of published encoders, modules and heads, on MLflow's model registry. Safetensors and JSON, no pickles.

    <name>.encoder                             one version per published encoder: the version is the encoder's
    <name>.publication.<encoder>.<n>           the n-th publication of tasks for one encoder
    <name>.module.<task>, <name>.head.<task>   for people and other programs; this one does not read them

Publishing is compare-and-swap without locks. All files are uploaded first. Then one call creates a registered model
with the next number, and the registry lets only one caller create a name: whoever is second finds it taken, and has
published nothing. What the publication consists of is in the tags of that same call, so nobody can see half of one,
and a publisher that dies leaves a whole one or none.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from orchestrator.catalog_files import Draft, Publication, PublicationFiles
from orchestrator.catalog_records import EncoderRecord, TaskEntry, TaskRecord
from orchestrator.catalog_registry import Registry, Tags
from orchestrator.errors import (
    AlreadyPublishedError,
    ConfigError,
    NotPublishedError,
    PublishConflictError,
    UnavailableError,
)
from orchestrator.mlflow_store import masked, open_client, store_uri
from orchestrator.privacy.guarantee import Guarantee

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def catalogs(uri: str) -> list[str]:
    """The names of all catalogs at that MLflow URI that have a published encoder."""
    found = Registry(open_client(uri), uri).models("*.encoder")
    names = (name.removesuffix(".encoder") for name in found)
    return sorted(name for name in names if _NAME.fullmatch(name) and Catalog(uri, name).encoder_versions())


class Catalog:
    """One name's encoders and their tasks. Any number of processes may read and publish at the same time.

    Methods raise `UnavailableError` if MLflow fails, and `CheckpointError` if a published file was changed or lost.
    """

    def __init__(self, uri: str, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"catalog name {name!r}: use at most 63 letters, digits, '-' and '_', starting with a letter or digit; "
                "choose one with --catalog"
            )
        self.uri, self.name = store_uri(uri), name

    # -- reading -------------------------------------------------------------------------------------------------------

    def encoder_versions(self) -> list[str]:
        """The versions of all published encoders, oldest first."""
        return [str(version) for version in self._encoder_tags()]

    def encoders(self) -> list[EncoderRecord]:
        """Every published encoder, oldest first."""
        return [self._find(version)[0] for version in self.encoder_versions()]

    def encoder(self, version: str = "latest") -> tuple[EncoderRecord, dict[str, Tensor]]:
        """A published encoder and its weights."""
        record, publication = self._find(version)
        return record, self._files.weights(publication, "encoder")[0]

    def tasks(self, encoder_version: str) -> dict[str, TaskRecord]:
        """Every published task of one encoder by name, in the order of publication."""
        encoder, _ = self._find(encoder_version)
        return _tasks_in(self._publications(encoder).values())

    def load_task(
        self, encoder_version: str, task: str
    ) -> tuple[TaskRecord, dict[str, Tensor], dict[str, Tensor] | None]:
        """A published task, its module's weights, and its head's if the tenant left one."""
        encoder, _ = self._find(encoder_version)
        publications = self._publications(encoder).values()
        for publication in publications:
            record = _tasks_in([publication]).get(task)
            if record is not None:
                module, _ = self._files.weights(publication, f"{task}/module")
                has_head = record.head_sha256 is not None
                return record, module, self._files.weights(publication, f"{task}/head")[0] if has_head else None
        known = ", ".join(sorted(_tasks_in(publications))) or "(none)"
        raise NotPublishedError(
            f"no task {task!r} is published for encoder {encoder.version} of catalog {self.name!r}; known: {known}"
        )

    def published_hashes(self, encoder_version: str) -> dict[str, str]:
        """The SHA-256 of every published file of an encoder and its tasks, from its bytes as they are now."""
        encoder, publication = self._find(encoder_version)
        publications = {"encoder": publication}
        publications |= {f"publication {n}": found for n, found in self._publications(encoder).items()}
        return {
            f"{title}: {name}": digest
            for title, found in publications.items()
            for name, digest in self._files.hashes(found).items()
        }

    # -- publishing ----------------------------------------------------------------------------------------------------

    def publish_encoder(self, record: EncoderRecord, state: Mapping[str, Tensor]) -> EncoderRecord:
        """Publish an encoder. Returns the record with its version, hash and time."""
        with self._files.draft() as draft:
            config = {key: record.to_json()[key] for key in ("backbone", "split_index", "image_size", "feature_shape")}
            digest = draft.add("encoder", state, config)
            record = dataclasses.replace(record, version="", weights_sha256=digest, created=_now())
            content = {"encoder": record.to_json(), "guarantee_text": Guarantee.from_json(record.guarantee).statement()}
            title = f"{self.name}: encoder"
            publication = self._files.upload(draft, content, title=title, training_run=record.run_id)
        tags = {"weights_sha256": digest}
        version = self._add_version(f"{self.name}.encoder", publication, "encoder", record, tags)
        self._files.close(publication)
        return dataclasses.replace(record, version=str(version))

    def publish_tasks(
        self, encoder_version: str, entries: Sequence[TaskEntry], *, expected: frozenset[str], run_id: str = ""
    ) -> list[TaskRecord]:
        """Publish tasks together, all or none, if ``expected`` are the published ones until the moment of publication.

        ``run_id`` is the run that trained them; by default the encoder's. Raises `AlreadyPublishedError` if one of them
        is published, and `PublishConflictError` if another one was published meanwhile; then nothing is.
        """
        encoder, _ = self._find(encoder_version)
        names = [entry.spec.name for entry in entries]
        if len(set(names)) != len(names):
            raise ConfigError(f"a task is named twice in one publication: {', '.join(names)}")
        before = self._publications(encoder)
        _check_expected(encoder, names, expected, published=_tasks_in(before.values()))
        if not entries:
            return []
        place = max(before, default=0) + 1
        with self._files.draft() as draft:
            records = [_add(draft, entry, encoder=encoder, place=place, run_id=run_id) for entry in entries]
            content = {"encoder_version": encoder.version, "tasks": [record.to_json() for record in records]}
            title = f"{self.name}: {', '.join(names)} on encoder {encoder.version}"
            publication = self._files.upload(draft, content, title=title, training_run=records[0].run_id)
        if not self._registry.take(self._place(encoder, place), publication.tags, description=title):
            self._files.discard(publication)
            _check_expected(encoder, names, expected, published=_tasks_in(self._publications(encoder).values()))
            raise PublishConflictError(f"{self._place(encoder, place)} is taken: somebody published at this moment")
        self._show(publication, records)
        self._files.close(publication)
        return records

    # -- the registry --------------------------------------------------------------------------------------------------

    @cached_property
    def _client(self) -> MlflowClient:
        return open_client(self.uri)

    @cached_property
    def _registry(self) -> Registry:
        return Registry(self._client, self.uri)

    @cached_property
    def _files(self) -> PublicationFiles:
        return PublicationFiles(self._client, self.uri, f"{self.name}.catalog")

    def _encoder_tags(self) -> dict[int, Tags]:
        """Version to the tags of its publication, oldest first."""
        first: dict[str, tuple[int, Tags]] = {}
        for version, tags in self._registry.versions(f"{self.name}.encoder").items():
            if "manifest_sha256" in tags:
                # A call whose answer was lost may have made a second version of the same publication.
                first.setdefault(tags["publication"], (version, tags))
        return dict(first.values())

    def _find(self, version: str) -> tuple[EncoderRecord, Publication]:
        """An encoder's record and files. Raises `NotPublishedError` with the known versions."""
        known = self._encoder_tags()
        if not known:
            raise NotPublishedError(
                f"no encoder is published in catalog {self.name!r} at {masked(self.uri)}: "
                "train one first with pipelines/train.py, or choose another catalog with --catalog"
            )
        number = max(known) if version == "latest" else int(version) if version.isdecimal() else 0
        if number not in known:
            versions = ", ".join(map(str, known))
            raise NotPublishedError(f"no encoder {version!r} in catalog {self.name!r}; known: {versions}, or latest")
        publication = self._files.read(known[number])
        record = EncoderRecord.from_json(publication.manifest["encoder"])
        return dataclasses.replace(record, version=str(number)), publication

    def _place(self, encoder: EncoderRecord, n: int | str) -> str:
        """The name that the n-th publication for an encoder takes."""
        return f"{self.name}.publication.{encoder.version}.{n}"

    def _publications(self, encoder: EncoderRecord) -> dict[int, Publication]:
        """Number to publication of tasks, in order."""
        found = self._registry.models(self._place(encoder, "*"))
        numbered = {name.rpartition(".")[2]: tags for name, tags in found.items()}
        return {int(n): self._files.read(numbered[n]) for n in sorted(filter(str.isdecimal, numbered), key=int)}

    def _show(self, publication: Publication, records: Sequence[TaskRecord]) -> None:
        """List modules and heads in the registry, for people. The tasks are published, whatever happens here."""
        try:
            for record in records:
                hashes = {"module": record.module_sha256, "head": record.head_sha256}
                for role, digest in hashes.items():
                    if digest is not None:
                        self._show_one(publication, record, role, digest)
        except UnavailableError as error:
            logger.warning("the tasks are published, but MLflow's list of models lacks some of them: %s", error)

    def _show_one(self, publication: Publication, record: TaskRecord, role: str, digest: str) -> None:
        tags = {
            "weights_sha256": digest,
            "encoder_version": record.encoder_version,
            "task_version": record.version,
            "private": str(record.private).lower(),
        }
        self._add_version(
            f"{self.name}.{role}.{record.spec.name}", publication, f"{record.spec.name}/{role}", record, tags
        )

    def _add_version(
        self,
        model: str,
        publication: Publication,
        part: str,
        record: EncoderRecord | TaskRecord,
        tags: Mapping[str, str],
    ) -> int:
        guarantee = Guarantee.from_json(record.guarantee)
        return self._registry.add_version(
            model,
            {**publication.tags, **tags, "guarantee": guarantee.short(), "training_run": record.run_id},
            source=self._files.source(publication, part),
            run_id=publication.run_id,
            description=guarantee.statement(),
        )


def _add(draft: Draft, entry: TaskEntry, *, encoder: EncoderRecord, place: int, run_id: str) -> TaskRecord:
    """Put a task's files into a draft, and describe them."""
    name, head_sha256 = entry.spec.name, None
    if entry.head_state is not None and entry.head_config is not None:
        head_sha256 = draft.add(f"{name}/head", entry.head_state, entry.head_config)
    return TaskRecord(
        spec=entry.spec,
        private=entry.private,
        encoder_version=encoder.version,
        version=f"{encoder.version}.{place}",
        module_config=entry.module_config,
        head_config=entry.head_config,
        module_sha256=draft.add(f"{name}/module", entry.module_state, entry.module_config),
        head_sha256=head_sha256,
        metrics=entry.metrics,
        guarantee=entry.guarantee,
        guarantee_text=Guarantee.from_json(entry.guarantee).statement(),
        run_id=run_id or encoder.run_id,
        created=_now(),
        dissimilarity=entry.dissimilarity,
    )


def _tasks_in(publications: Iterable[Publication]) -> dict[str, TaskRecord]:
    records = [TaskRecord.from_json(task) for p in publications for task in p.manifest["tasks"]]
    return {record.spec.name: record for record in records}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _check_expected(
    encoder: EncoderRecord, names: Sequence[str], expected: frozenset[str], *, published: Mapping[str, TaskRecord]
) -> None:
    for name in names:
        if name in published:
            raise AlreadyPublishedError(name, encoder.version)
    if unexpected := sorted(published.keys() - expected):
        raise PublishConflictError(
            f"published for encoder {encoder.version} after this training began: {', '.join(unexpected)}. "
            "Train the new pairs apart, then publish again; nothing was published now"
        )
    if lost := sorted(expected - published.keys()):
        raise PublishConflictError(
            f"no longer published for encoder {encoder.version}: {', '.join(lost)}. "
            "Read the catalog again, then publish; nothing was published now"
        )
