"""What is to be served, as the catalog describes it, and a look at it: where the catalog and the networks are.

It reads the file that `pipelines/deploy.py` keeps, so an update is seen at once.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from orchestrator.catalog_records import EncoderRecord
from orchestrator.errors import MetaMorphosisError
from serve.arguments import TaskArgs, VersionArgs
from serve.deployment.state import DeploymentsFile
from serve.leakage import measured
from serve.model import MAX_PIXELS, card_of
from serve.operator.exhibits import EncoderKey, Records, encoder_key
from serve.operator.look import Looker
from serve.operator.samples import Samples
from serve.operator.views import Look, Served, TaskView, Unreadable, VersionView


class CatalogViewer:
    """`serve.operator.views.Viewer` in this process. Many coroutines may use it; they look one at a time."""

    def __init__(self, served: Path, *, pictures: bool = False, max_pixels: int = MAX_PIXELS) -> None:
        """``served`` is the file of deployments; ``pictures`` allows those that may show people."""
        self._file, self._records, samples = DeploymentsFile(served), Records(), Samples()
        self.looker = Looker(samples, pictures=pictures, max_pixels=max_pixels)
        self._samples, self._lock = samples, threading.Lock()

    async def served(self) -> Served:
        """See `serve.operator.views.Viewer.served`. Raises `CheckpointError` for a damaged file."""
        return await asyncio.to_thread(self._served)

    async def look(self, *, sample: int, image: bytes | None) -> Look | Unreadable:
        """See `serve.operator.views.Viewer.look`."""
        return await asyncio.to_thread(lambda: self.looker.look(self._args(), sample=sample, image=image))

    def _served(self) -> Served:
        args = self._args()
        with self._lock:
            tasks = tuple(
                TaskView(
                    task=task,
                    catalog=one.source.catalog,
                    versions=tuple(self._version(one, version) for version in one.versions()),
                )
                for task, one in args.items()
            )
            encoders = self._encoders(args.values())
        return Served(
            tasks=tasks,
            samples=len(self._samples.rows(encoders)),
            pictures=all(self.looker.may_draw(encoder) for encoder in encoders),
        )

    def _args(self) -> dict[str, TaskArgs]:
        return {task: one.args for task, one in sorted(self._file.read().tasks.items())}

    def _version(self, args: TaskArgs, version: VersionArgs) -> VersionView:
        canary = version is args.canary
        view = VersionView(
            version=version.version,
            encoder_version=version.encoder_version,
            share=args.share if canary else 1 - args.share,
            canary=canary,
        )
        try:
            encoder, record = self._records.of(args.source, version, args.task)
            leakage = None if version.evaluation is None else measured(Path(version.evaluation), args.task)
        except MetaMorphosisError as error:
            return replace(view, fault=str(error))
        own = record.metrics.get("accuracy", math.nan)
        return replace(
            view, card=card_of(encoder, record).to_json(), own=None if math.isnan(own) else float(own), leakage=leakage
        )

    def _encoders(self, served: Iterable[TaskArgs]) -> list[EncoderRecord]:
        found: dict[EncoderKey, EncoderRecord] = {}
        for args in served:
            for version in args.versions():
                try:
                    found[encoder_key(args.source, version)] = self._records.of(args.source, version, args.task)[0]
                except MetaMorphosisError:  # told where the version is described
                    continue
        return list(found.values())
