"""The Ray Serve shell: one app per task, and an optional app per encoder.

Plain classes do the work (`serve.service`, `serve.model`, `serve.batches`); what is here is health and arguments. A
replica is made from plain values, loads everything itself, and refuses to start as another version than the one it is
to be.
"""

import asyncio
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve import Application

from orchestrator.catalog import Catalog
from orchestrator.errors import CheckpointError
from orchestrator.privacy.bounded.keyed_noise import NoiseKey
from orchestrator.runs.noise import noise_key_path
from serve.api import build_api
from serve.arguments import (
    ENCODER,
    ENDPOINT,
    CatalogArgs,
    EncoderArgs,
    TaskArgs,
    VersionArgs,
    encoder_app_name,
    route_of,
)
from serve.batches import Batches
from serve.leakage import measured
from serve.metrics import RayMeter
from serve.middlewares import take_publications
from serve.model import EncoderFeatures, EncoderModel, ModuleModel, TaskModel
from serve.service import Lane, Lanes, TaskService
from serve.streams import FeatureStore
from serve.tenants.gate import Gate
from serve.traffic import Meters, TrafficMeter, traffic_folder
from tasks.datasets.table import ImageArray

_REMEMBERED: Final = 256
"""u of so many images, while the other tasks ask for it too."""


class TaskEndpoint:
    """One task's replica: E and g_i, or g_i alone behind a shared encoder."""

    def __init__(self, args: TaskArgs, encoders: dict[str, str] | None = None) -> None:
        """``encoders``: name of the app of each shared encoder, by version."""
        catalog = _open(args.source)
        lanes = [_lane(catalog, args.source, args.task, version, encoders) for version in args.versions()]
        key = noise_key_path(Path(args.source.storage), args.source.catalog)
        self._store = FeatureStore(Path(args.streams) / f"{args.task}.db", args.ring())
        self._gate = Gate(Path(args.registry))
        self._traffic = TrafficMeter(traffic_folder(Path(args.streams).parent))
        self._scaled = args.replicas.scaled
        self._service = TaskService(
            args.task,
            Lanes(current=lanes[0], canary=lanes[1] if lanes[1:] else None, share=args.share),
            store=self._store,
            gate=self._gate,
            meter=Meters(RayMeter(), self._traffic),
            noise_key=NoiseKey.load(key) if any(lane.module.release for lane in lanes) or key.exists() else None,
            limits=args.limits(),
            leakage={
                version.version: measured(Path(version.evaluation), args.task)
                for version in args.versions()
                if version.evaluation is not None
            },
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = build_api(self._service)
        if not self._scaled:
            take_publications(route_of(self._service.task), app)
        return app

    def check_health(self) -> None:
        """Whether the stream can be read and nothing is stuck."""
        self._service.check()

    def identity(self) -> dict[str, Any]:
        """Which process this is, and what it serves: for the operator, by handle only."""
        versions = {lane.version: share for lane, share in self._service.lanes.shares()}
        return {"pid": os.getpid(), "task": self._service.task, "versions": versions}

    def __del__(self) -> None:
        for name in ("_store", "_gate"):
            if (opened := getattr(self, name, None)) is not None:
                opened.close()


class SharedEncoder:
    """E for all tasks of an encoder: an image that is sent to several of them is encoded once."""

    def __init__(self, args: EncoderArgs) -> None:
        catalog, source = _open(args.source), args.source
        self._encoder = EncoderModel.load(
            catalog, args.encoder_version, device=source.device, arithmetic=source.arithmetic
        )
        self._known: OrderedDict[bytes, asyncio.Future[EncoderFeatures]] = OrderedDict()
        self._encoded = 0
        self._jobs = Batches(
            self._batch,
            name="inference",
            max_batch=args.replicas.max_batch,
            wait_s=args.replicas.batch_wait_s,
        )

    async def encode(self, pixels: ImageArray, digest: bytes) -> EncoderFeatures:
        """(C, H, W) of one image, from memory if another task just asked."""
        if digest not in self._known:
            self._known[digest] = asyncio.ensure_future(self._jobs.do(pixels))
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        future = self._known[digest]
        try:
            return await asyncio.shield(future)
        except BaseException:
            if future.done():
                self._known.pop(digest, None)
            raise

    def encoded(self) -> int:
        """Images that went through the network so far: for the operator, by handle only."""
        return self._encoded

    def check_health(self) -> None:
        """Whether nothing is stuck."""
        self._jobs.check()

    def _batch(self, images: list[ImageArray]) -> list[EncoderFeatures]:
        self._encoded += len(images)
        return list(self._encoder.encode(np.stack(images)))


def task_app(args: TaskArgs) -> Application:
    """What a Serve config names as ``serve.app:task_app``."""
    encoders = None
    if args.shared_encoder:
        encoders = {
            v.encoder_version: encoder_app_name(args.source.catalog, v.encoder_version) for v in args.versions()
        }
    app: Application = (
        ray_serve.deployment(name=ENDPOINT)(ray_serve.ingress()(TaskEndpoint))
        .options(**args.replicas.options())
        .bind(args, encoders)
    )
    return app


def encoder_app(args: EncoderArgs) -> Application:
    """What a Serve config names as ``serve.app:encoder_app``."""
    app: Application = ray_serve.deployment(name=ENCODER)(SharedEncoder).options(**args.replicas.options()).bind(args)
    return app


def _lane(
    catalog: Catalog, source: CatalogArgs, task: str, version: VersionArgs, encoders: dict[str, str] | None
) -> Lane:
    module = ModuleModel.load(
        catalog,
        version.encoder_version,
        task,
        storage=Path(source.storage),
        device=source.device,
        arithmetic=source.arithmetic,
    )
    if module.card.version != version.version:
        raise CheckpointError(
            f"task {task!r} of encoder {version.encoder_version} is {module.card.version} in the catalog, "
            f"and {version.version} is to be served"
        )
    if encoders is None:
        encoder = EncoderModel.load(
            catalog, version.encoder_version, device=source.device, arithmetic=source.arithmetic
        )
        return Lane(module=module, infer=TaskModel(encoder, module).infer)
    elsewhere = ray_serve.get_deployment_handle(ENCODER, app_name=encoders[version.encoder_version])

    async def encode(pixels: ImageArray, digest: bytes) -> EncoderFeatures:
        return cast("EncoderFeatures", await elsewhere.encode.remote(pixels, digest))

    return Lane(module=module, infer=module.features, encode=encode)


def _open(source: CatalogArgs) -> Catalog:
    """The catalog; the process computes with so many threads from now on."""
    torch.set_num_threads(source.threads)
    return Catalog(source.tracking_uri, source.catalog)
