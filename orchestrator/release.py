"""What leaves the producer of a bounded feature: s under noise, on a grid (`orchestrator.privacy.bounded`).

    module          producer                                          tenant
    s, exact  --->  z = quantised(s + tau n)                   --->   z, and nothing else
       ^                                                              |
       +-----------------  dL/dz, as it is: dz/ds = 1  <--------------+

When        the noise n is a function of the key and
training    (run, task, step, place in the batch): other weights see the image each time, so each step is a release
evaluation  (run, task, steps done, image): asking twice between two steps gives the same bytes
published   (task, version and weights, image): the same bytes for ever; or nothing, where the task was published
            with fresh noise: then every release is another draw

Axes: B examples, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.catalog_records import EncoderRecord, TaskRecord
from orchestrator.errors import ConfigError
from orchestrator.inputs import Rows
from orchestrator.privacy.bounded.bit_ledger import BitLedger
from orchestrator.privacy.bounded.channel import ChannelConfig, quantised, transmit
from orchestrator.privacy.bounded.keyed_noise import (
    ImageDigests,
    Noise,
    NoiseKey,
    fresh_normal,
    keyed_normal,
    release_digests,
    step_normal,
)
from orchestrator.privacy.guarantee import Guarantee


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisePlan:
    """Where a session's noise comes from. The key itself does not travel: the producer reads it."""

    key: Path
    """The key's file, on storage that only the producer's trust domain reads."""
    run: str
    """Of one training alone, and the same when it is resumed."""


class SessionRelease:
    """What one session hands out. Owned by the producer, and holds its key."""

    def __init__(self, plan: NoisePlan, channel: ChannelConfig, *, images: NDArray[np.uint8], rows: Rows) -> None:
        """``images`` are the whole table's. Raises as `NoiseKey.load`."""
        self._key, self._run, self._channel = NoiseKey.load(plan.key), plan.run, channel
        self._images, self._rows = images, rows

    def training(self, s_BD11: Tensor, *, task: str, step: int) -> Tensor:
        """z of one step's batch, on the CPU."""
        noise = step_normal(self._key, run=self._run, task=task, step=step, n=len(s_BD11), channel=self._channel)
        return released(s_BD11, noise, self._channel.noise)

    def evaluation(self, s_BD11: Tensor, *, task: str, steps_done: int, subset: str, start: int) -> Tensor:
        """z of some rows of a subset, from ``start`` on."""
        rows = self._rows[subset][start : start + len(s_BD11)]
        version = f"run {self._run}, {steps_done} steps"
        noise = keyed_normal(
            self._key, task=task, version=version, channel=self._channel, images=ImageDigests.of(self._images[rows])
        )
        return released(s_BD11, noise, self._channel.noise)


def released(s: Tensor, noise: Noise, tau: float) -> Tensor:
    """z of s, of its shape, in float32: what a tenant may have. The noise has one row an example."""
    exact = s.detach().to("cpu", torch.float64)
    return quantised(transmit(exact, torch.from_numpy(noise).reshape(exact.shape), tau)).float()


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRelease:
    """How features of one published bounded task leave the producer: what they cost, and then their noise."""

    key: NoiseKey = field(repr=False)
    task: str
    version: str
    """Under which noise is drawn and bits are charged; see `published_version`."""
    channel: ChannelConfig
    fresh: bool
    """Whether every release has noise of its own."""

    @classmethod
    def of(cls, encoder: EncoderRecord, record: TaskRecord, key: NoiseKey) -> PublishedRelease:
        """As the task was published. Raises `ConfigError` for one whose feature nothing bounds."""
        promise = Guarantee.from_json(dict(record.guarantee))
        if promise.channel is None:
            raise ConfigError(f"nothing bounds the feature of {record.spec.name!r}, so there is no noise to release it")
        return cls(
            key=key,
            task=record.spec.name,
            version=published_version(encoder, record),
            channel=promise.channel,
            fresh=promise.noise_kind == "fresh",
        )

    def charge(self, ledger: BitLedger, *, tenant: str, images: ImageDigests) -> float:
        """Charge a release of these images to a tenant, on the disk, before it is made; the bits that it costs.

        Keyed noise: images that this tenant was given before are free. Fresh: each costs again. Raises as
        `BitLedger.charge`; then nothing may be released.
        """
        digests = release_digests(self.key, tenant=tenant, task=self.task, version=self.version, images=images)
        bits = self.channel.bits_per_image
        return ledger.charge(tenant, self.task, self.version, digests, bits, fresh=self.fresh)

    def noisy(self, s: Tensor, images: ImageDigests) -> Tensor:
        """z of s (B, d, h, w), for the images with these digests."""
        if self.fresh:
            return released(s, fresh_normal(len(s), self.channel), self.channel.noise)
        noise = keyed_normal(self.key, task=self.task, version=self.version, channel=self.channel, images=images)
        return released(s, noise, self.channel.noise)


def published_version(encoder: EncoderRecord, record: TaskRecord) -> str:
    """Under which a published task's noise is drawn: its version, and the weights that make s.

    A version's number alone may come again, where a catalog is begun anew beside the same key. With other weights and
    the same noise, the difference of two features would hold no noise.
    """
    return f"{record.version} {encoder.weights_sha256} {record.module_sha256}"
