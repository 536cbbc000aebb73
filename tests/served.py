"""What the tests of serving stand on: a small published catalog, and its endpoints without a cluster."""

from __future__ import annotations

import asyncio
import io
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from orchestrator.catalog import Catalog
from orchestrator.privacy.bounded.keyed_noise import NoiseKey
from orchestrator.runs.noise import noise_key_path
from pipelines import add_task, train
from pipelines.command import execute
from serve.api import build_api
from serve.model import TaskModel
from serve.ports import NoMeter
from serve.service import Lane, Lanes, ServiceLimits, TaskService
from serve.streams import FeatureStore
from serve.tenants.gate import Gate, Places
from serve.tenants.registry import Registry
from tasks.datasets import open_dataset
from tasks.datasets.options import DatasetOptions

CATALOG = "digits"
LIMITS = ServiceLimits()
SIZE = 16
QUICK = [
    *("--image-size", str(SIZE), "--split-index", "5", "--head", "linear", "--device", "cpu", "--threads", "1"),
    *("--epochs", "1", "--batch-size", "128", "--engine", "process", "--accountant", "rdp"),
]


def train_shop(home: Path) -> None:
    """Encoder 1 with loop, large, the bounded digit and the private parity; encoder 2 with loop and parity."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAMORPHOSIS_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        sold = ["--private", "parity", "--algorithm", "task", "--epsilon", "None"]
        trains, adds = "orchestrator.settings.train:TrainSettings", "orchestrator.settings.add_task:AddTaskSettings"
        assert execute(trains, train.run, [*QUICK, *sold, "--tasks", "loop,large"], prog="train.py") == 0
        bounded = ["--task-privacy", "bounded", "--feature-bits", "4", "--engine", "process", "--threads", "1"]
        flags = ["digit", *bounded, "--epochs", "1", "--head", "mlp"]
        assert execute(adds, add_task.run, flags, prog="add_task.py") == 0
        again = [*QUICK, *sold, "--tasks", "loop", "--seed", "1"]
        assert execute(trains, train.run, again, prog="train.py") == 0


def digit_images(n: int) -> np.ndarray:
    """(n, S, S, 3) uint8: the first digits, as they were trained on."""
    return open_dataset("digits", image_size=SIZE, options=DatasetOptions()).images[:n]


def png(image: np.ndarray) -> bytes:
    """As a file that decodes to the same pixels."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


class AppClient:
    """Asks an app in this process, one request after the other or several at once."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    def request(self, method: str, path: str, **options: object) -> httpx.Response:
        """One."""
        return asyncio.run(self.all([(method, path, options)]))[0]

    def get(self, path: str, **options: object) -> httpx.Response:
        """GET."""
        return self.request("GET", path, **options)

    def post(self, path: str, **options: object) -> httpx.Response:
        """POST."""
        return self.request("POST", path, **options)

    async def all(self, requests: list[tuple[str, str, dict]]) -> list[httpx.Response]:
        """Several at once."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://task") as client:
            return await asyncio.gather(*(client.request(m, path, **options) for m, path, options in requests))


class Shop:
    """The catalog with its tenants, and endpoints in this process."""

    def __init__(self, home: Path, state: Path) -> None:
        self.home, self.state = home, state
        self.catalog = Catalog(f"sqlite:///{home}/mlflow.db", CATALOG)
        self.places = Places.in_storage(state)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.registry = self._stack.enter_context(Registry(self.places.registry))
        self.gate = Gate(self.places.registry)
        self._stack.callback(self.gate.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def token(self, name: str, role: str, **grants: list[str]) -> dict[str, str]:
        """Headers of somebody new."""
        issued = self.registry.add(name, role)  # type: ignore[arg-type]
        for task, verbs in grants.items():
            self.registry.grant(name, task, verbs)  # type: ignore[arg-type]
        return {"Authorization": f"Bearer {issued.token.text}"}

    def model(self, task: str, encoder: str = "1") -> TaskModel:
        """From the catalog."""
        return TaskModel.load(self.catalog, encoder, task, storage=self.home, device="cpu")

    def lane(self, task: str, encoder: str = "1") -> Lane:
        """One version, inferring in this process."""
        model = self.model(task, encoder)

        return Lane(module=model.module, infer=model.infer)

    def store(self, task: str) -> FeatureStore:
        """Its stream."""
        store = FeatureStore(self.state / "streams" / f"{task}.db")
        self._stack.callback(store.close)
        return store

    def service(self, task: str, *, limits: ServiceLimits = LIMITS, lanes: Lanes | None = None) -> TaskService:
        """The endpoint, without HTTP."""
        return TaskService(
            task,
            lanes or Lanes(current=self.lane(task)),
            store=self.store(task),
            gate=self.gate,
            meter=NoMeter(),
            noise_key=NoiseKey.load(noise_key_path(self.home, CATALOG)),
            limits=limits,
        )

    def client(self, task: str, *, limits: ServiceLimits = LIMITS, lanes: Lanes | None = None) -> AppClient:
        """The endpoint over HTTP."""
        return AppClient(build_api(self.service(task, limits=limits, lanes=lanes)))
