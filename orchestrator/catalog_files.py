"""The files of publications: artefacts of MLflow runs, each checked against a manifest, and that against the registry.

    manifest.json                                     what is published, and the SHA-256 of every other file
    <part>/weights.safetensors, <part>/config.json    a network; parts: ``encoder``, ``<task>/module``, ``<task>/head``

Files are uploaded first. A publication exists from when the registry holds its run id and its manifest's SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from orchestrator.checkpoint import load_weights, save_weights
from orchestrator.errors import CheckpointError
from orchestrator.mlflow_store import open_experiment, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FORMAT = 1
_MANIFEST = "manifest.json"
_WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """Files that belong together, all of them there before anything points to them."""

    run_id: str
    """The run that holds the files; it is the publication's identity."""
    manifest: Mapping[str, Any] = field(repr=False)
    manifest_sha256: str

    @property
    def tags(self) -> dict[str, str]:
        """What the registry must hold for the publication to be found and trusted."""
        return {"publication": self.run_id, "manifest_sha256": self.manifest_sha256}

    def parts(self) -> list[str]:
        """The networks in it."""
        return sorted(name.removesuffix(f"/{_WEIGHTS}") for name in self.manifest["files"] if name.endswith(_WEIGHTS))


class Draft:
    """A publication that is being put together in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, part: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
        """Write one network. Returns the SHA-256 of its weights file."""
        return save_weights(self.folder / part / _WEIGHTS, state, config)


class PublicationFiles:
    """Writes and reads publications in one experiment of an MLflow store."""

    def __init__(self, client: MlflowClient, uri: str, experiment: str) -> None:
        self._client, self._uri, self._experiment = client, uri, experiment
        self._manifests: dict[str, Publication] = {}

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        """A place to put the files of a new publication."""
        with tempfile.TemporaryDirectory(prefix="metamorphosis-publish-") as folder:
            yield Draft(Path(folder))

    def upload(self, draft: Draft, content: Mapping[str, Any], *, title: str, training_run: str) -> Publication:
        """Upload everything. Nothing points to it yet."""
        files = {name: _sha256(draft.folder / name) for name in _names(draft.folder)}
        manifest = {"format": _FORMAT, **content, "files": files}
        (draft.folder / _MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False), encoding="utf-8")
        with store_errors(self._uri):
            run = self._client.create_run(self._experiment_id, run_name=title, tags={"training_run": training_run})
        publication = Publication(
            run_id=run.info.run_id, manifest=manifest, manifest_sha256=_sha256(draft.folder / _MANIFEST)
        )
        try:
            with store_errors(self._uri):
                self._client.log_artifacts(publication.run_id, str(draft.folder))
        except BaseException:
            self.discard(publication)
            raise
        return publication

    def close(self, publication: Publication) -> None:
        """Mark the run as finished; for people who look at it, so that failing to do so is no failure."""
        with suppress(Exception):
            self._client.set_terminated(publication.run_id, "FINISHED")

    def discard(self, publication: Publication) -> None:
        """Delete what was uploaded in vain, if that can be done; nothing points to it in any case."""
        with suppress(Exception):
            self._client.set_terminated(publication.run_id, "FAILED")
            self._client.delete_run(publication.run_id)

    def read(self, tags: Mapping[str, str]) -> Publication:
        """The publication that the registry's tags name. Raises `CheckpointError` if its manifest is not as it was."""
        run_id, digest = tags["publication"], tags["manifest_sha256"]
        known = self._manifests.get(run_id)
        if known is not None and known.manifest_sha256 == digest:
            return known
        with self._fetched(run_id, _MANIFEST) as path:
            if _sha256(path) != digest:
                raise CheckpointError(f"the manifest of publication {run_id} was changed after it was published")
            manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.get("format") != _FORMAT:
            raise CheckpointError(
                f"publication {run_id} has format {manifest.get('format')}, this program reads {_FORMAT}: "
                "use the program that published it"
            )
        self._manifests[run_id] = Publication(run_id=run_id, manifest=manifest, manifest_sha256=digest)
        return self._manifests[run_id]

    def weights(self, publication: Publication, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(state, config) of one network. Raises `CheckpointError` if a byte of it was changed or lost."""
        with self._fetched(publication.run_id, part) as folder:
            for name, digest in publication.manifest["files"].items():
                if name.startswith(f"{part}/"):
                    _check_file(folder / name.removeprefix(f"{part}/"), digest, f"{name} of {publication.run_id}")
            return load_weights(folder / _WEIGHTS)

    def hashes(self, publication: Publication) -> dict[str, str]:
        """The SHA-256 of every file as it is now, by name: read again, not taken from the manifest."""
        with self._fetched(publication.run_id, "") as folder:
            missing = {_MANIFEST, *publication.manifest["files"]} - set(_names(folder))
            if missing:
                raise CheckpointError(f"publication {publication.run_id} has lost {', '.join(sorted(missing))}")
            return {name: _sha256(folder / name) for name in (_MANIFEST, *publication.manifest["files"])}

    def source(self, publication: Publication, part: str) -> str:
        """Where MLflow finds one network's files."""
        with store_errors(self._uri):
            return f"{self._client.get_run(publication.run_id).info.artifact_uri}/{part}"

    @cached_property
    def _experiment_id(self) -> str:
        return open_experiment(self._client, self._uri, self._experiment)

    @contextmanager
    def _fetched(self, run_id: str, path: str) -> Iterator[Path]:
        """A private copy of a file or folder."""
        from mlflow.exceptions import MlflowException

        gone = (
            f"{path or 'the files'} of publication {run_id} cannot be read: somebody removed it from MLflow's artefacts"
        )
        with tempfile.TemporaryDirectory(prefix="metamorphosis-fetch-") as folder:
            try:
                with store_errors(self._uri):
                    try:
                        # Where below the folder it lands depends on where the artefacts are kept.
                        fetched = Path(self._client.download_artifacts(run_id, path, folder))
                    except MlflowException as error:
                        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                            raise
                        raise CheckpointError(gone) from error
            except OSError as error:
                raise CheckpointError(f"{gone} ({error})") from error
            yield fetched


def _check_file(path: Path, digest: str, what: str) -> None:
    if not path.exists():
        raise CheckpointError(f"{what} is gone")
    if _sha256(path) != digest:
        raise CheckpointError(f"{what} was changed after it was published")


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
