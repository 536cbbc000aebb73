"""Endpoints around random networks, with any names and versions: for tests of who gets what."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import torch
from fastapi import FastAPI
from tiny import TINY_NETWORK

from orchestrator.privacy.bounded.keyed_noise import ImageDigests
from serve.api import build_api
from serve.front import build_front
from serve.model import EncoderModel, ModuleModel, TaskCard, TaskModel
from serve.ports import NoMeter
from serve.service import Lane, Lanes, ServiceLimits, TaskService
from serve.streams import FeatureStore, NewFeature, RingLimits
from serve.tenants.gate import Gate
from tasks.datasets.table import Normalisation

SIZE = 16
CPU = torch.device("cpu")


def small_model(task: str, version: str) -> TaskModel:
    """Another one for every task and version."""
    half = (0.5, 0.5, 0.5)
    encoder = TINY_NETWORK.build_encoder(seed=0)
    module = TINY_NETWORK.build_modules([f"{task} {version}"], SIZE, seed=0)[f"{task} {version}"]
    card = TaskCard(
        task=task,
        version=version,
        classes=("no", "yes"),
        feature_shape=TINY_NETWORK.task_shape(SIZE),
        bits_per_feature=None,
        epsilon=None,
        delta=None,
        guarantee="nothing is guaranteed",
        created="2026-01-31T12:00:00+00:00",
    )
    return TaskModel(
        EncoderModel(encoder, Normalisation(mean=half, std=half), device=CPU),
        ModuleModel(module, card, image_size=SIZE, release=None, device=CPU),
    )


def lane_of(model: TaskModel) -> Lane:
    """Inferring in this process."""

    return Lane(module=model.module, infer=model.infer)


class SmallServices:
    """Some tasks behind one gate, each with the versions 1 (served) and 2 (the canary). A context manager."""

    LIMITS, RING = ServiceLimits(), RingLimits()

    def __init__(
        self,
        registry: Path,
        tasks: Iterable[str],
        *,
        limits: ServiceLimits = LIMITS,
        ring: RingLimits = RING,
    ) -> None:
        self._registry, self._tasks, self._limits, self._ring = registry, tuple(tasks), limits, ring
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.gate = Gate(self._registry)
        self._stack.callback(self.gate.close)
        self.models = {(task, version): small_model(task, version) for task in self._tasks for version in "12"}
        self.stores = {task: self._store(task) for task in self._tasks}
        self.services = {task: self._service(task) for task in self._tasks}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def app(self) -> FastAPI:
        """All of them as Serve mounts them, with the front behind."""
        root = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        for task, service in self.services.items():
            root.mount(f"/tasks/{task}", build_api(service))
        root.mount("/", build_front(self.gate))
        return root

    def publish(self, task: str, version: str, images_BSS3: np.ndarray) -> np.ndarray:
        """Into the stream, and what was."""
        z = self.models[task, version].features(images_BSS3)
        digests = ImageDigests.of(images_BSS3).sha256
        self.stores[task].append(
            [NewFeature(version=version, image=image, z=one) for image, one in zip(digests, z, strict=True)]
        )
        return z

    def _store(self, task: str) -> FeatureStore:
        store = FeatureStore(self._registry.parent / "streams" / f"{task}.db", self._ring)
        self._stack.callback(store.close)
        return store

    def _service(self, task: str) -> TaskService:
        current, canary = (lane_of(self.models[task, version]) for version in "12")
        return TaskService(
            task,
            Lanes(current=current, canary=canary, share=0.5),
            store=self.stores[task],
            gate=self.gate,
            meter=NoMeter(),
            limits=self._limits,
        )
