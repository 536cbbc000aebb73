"""What the tests of the operator's page stand on: a viewer that needs no catalog, and the app around it."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from fastapi import FastAPI

from serve.front import build_front
from serve.operator.page import AppState
from serve.operator.routes import Office
from serve.operator.sessions import Sessions
from serve.operator.views import (
    Answer,
    FeatureView,
    Look,
    Reconstruction,
    Served,
    Swap,
    TaskView,
    Unreadable,
    VersionView,
)
from serve.tenants.gate import Gate
from serve.tenants.registry import Registry

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
ORIGIN = "http://root.test"


def card(task: str, **more: object) -> dict[str, object]:
    known = {
        "task": task,
        "version": "1.1-0123456789ab",
        "classes": ("open", "closed"),
        "feature_shape": (128, 2, 2),
        "bits_per_feature": None,
        "epsilon": None,
        "delta": None,
        "guarantee": "No image-level guarantee: trained without differential privacy.",
        "created": "2026-01-01T00:00:00+00:00",
    }
    return {**known, **more}


SERVED = Served(
    tasks=(
        TaskView(
            task="loop",
            catalog="digits",
            versions=(
                VersionView(
                    version="1.1-0123456789ab",
                    encoder_version="1",
                    share=0.9,
                    card=card("loop"),
                    own=0.953,
                    leakage={
                        "budget": "quick",
                        "evaluated": "2026-01-02T00:00:00",
                        "targets": 2,
                        "excess": 0.314,
                        "bits": 0.21,
                    },
                ),
                VersionView(
                    version="2.1-ba9876543210",
                    encoder_version="2",
                    share=0.1,
                    canary=True,
                    fault=f"the catalog is {HOSTILE}",
                ),
            ),
        ),
        TaskView(
            task="digit",
            catalog="digits",
            versions=(
                VersionView(
                    version="1.2-0123456789ab",
                    encoder_version="1",
                    share=1.0,
                    card=card("digit", bits_per_feature=4.0, epsilon=2.5, delta=1e-5, guarantee=HOSTILE),
                ),
            ),
        ),
    ),
    samples=360,
    pictures=True,
)


@dataclass
class FakeViewer:
    """Answers what it is given, and remembers what it was asked."""

    asked: list[tuple[int, bytes | None]] = field(default_factory=list)
    error: Exception | None = None

    async def served(self) -> Served:
        if self.error is not None:
            raise self.error
        return SERVED

    async def look(self, *, sample: int, image: bytes | None) -> Look | Unreadable:
        self.asked.append((sample, image))
        if image == b"no image":
            return Unreadable(f"it is {HOSTILE}")
        nothing = Reconstruction(state="none", text="There is no reconstruction: the data set is gone")
        return Look(
            title=f"Digit {sample}",
            features=(FeatureView(name="loop", text="128 maps of 2 x 2", reconstruction=nothing),),
            encoders=(FeatureView(name="encoder", text="64 maps of 4 x 4", reconstruction=nothing),),
            swap=Swap(
                heads=("loop",),
                truths=("open",),
                rows=(("loop", (Answer(label=HOSTILE, share=0.875, own=True, right=True),)), ("digit", (None,))),
                missing=("digit",),
            ),
        )


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """The app with its files, and a browser that keeps cookies."""

    def __init__(self, folder: Path, *, base_url: str = ORIGIN, tls: bool = False) -> None:
        self.clock, self.viewer, self.registry_path = Clock(), FakeViewer(), folder / "tenants.db"
        self.registry = Registry(self.registry_path)
        self.gate = Gate(self.registry_path)
        self.sessions = Sessions(clock=self.clock)
        self.traffic = folder / "traffic"
        self.office = Office(
            gate=self.gate,
            viewer=self.viewer,
            traffic=self.traffic,
            states=lambda: {"loop": AppState(state="RUNNING", replicas="2 running")},
            tls=tls,
            max_body_bytes=1000,
            sessions=self.sessions,
        )
        self.app: FastAPI = build_front(self.gate, self.office)
        self.base_url, self.cookies = base_url, httpx.Cookies()
        self.root = self.registry.add("root", "operator").token.text

    def close(self) -> None:
        self.registry.close()
        self.gate.close()

    def request(self, method: str, path: str, *, origin: str | None = None, **options: object) -> httpx.Response:
        """As a browser on the page would send it, unless ``origin`` or headers say otherwise."""
        headers = {"Origin": origin or self.base_url, **dict(options.pop("headers", {}))}  # type: ignore[call-overload]

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=self.base_url, cookies=self.cookies) as client:
                response = await client.request(method, path, headers=headers, **options)  # type: ignore[arg-type]
                self.cookies = client.cookies
                return response

        return asyncio.run(ask())

    def login(self, token: str | None = None, **options: object) -> httpx.Response:
        return self.request("POST", "/login", data={"token": token or self.root}, **options)

    def form_token(self) -> str:
        found = re.search(r'name="form_token" value="([^"]+)"', self.request("GET", "/").text)
        assert found is not None
        return found[1]
