"""A published task as something that answers: encoded image in, feature out.

The pixels, u and z of an image are those of evaluation (`orchestrator.evaluation.collect`): the same decoding, u
rounded to float16 as the feature cache holds it, and for a bounded feature the same noise, if it is keyed. A private
task cannot be loaded.

Axes: B images, S pixels a side, C channels, H and W of a feature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orchestrator.catalog import Catalog
from orchestrator.catalog_records import EncoderRecord, TaskRecord
from orchestrator.errors import DataError, NonFiniteFeatureError, PrivacyRefusal
from orchestrator.models.cross_sec import for_inference
from orchestrator.models.modules import ModuleConfig, rebuild_module
from orchestrator.network import freeze, pick_device
from orchestrator.privacy.bounded.keyed_noise import ImageDigests, NoiseKey
from orchestrator.privacy.guarantee import Guarantee
from orchestrator.release import PublishedRelease
from orchestrator.runs.noise import noise_key_path
from orchestrator.runs.publishing import network_of
from serve.versions import served_version
from tasks.datasets.decoding import decode_image
from tasks.datasets.table import ImageArray, Normalisation
from tasks.transforms import to_tensor

Features = NDArray[np.float32]
EncoderFeatures = NDArray[np.float16]
Arithmetic = Literal["fp32", "half"]
"""half is float16 on a GPU and bfloat16 on a CPU."""

MAX_PIXELS: Final = 16_000_000
"""Of an image that is sent; decoding one takes up to 100 ms and 50 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskCard:
    """What is said of a served task to whoever may read its metadata. Nothing of images, data or other tasks."""

    task: str
    version: str
    """See `serve.versions.served_version`."""
    classes: tuple[str, ...]
    feature_shape: tuple[int, int, int]
    """(C, H, W)."""
    bits_per_feature: float | None
    """The most that one feature tells of its image; None: nothing bounds it."""
    epsilon: float | None
    """Guaranteed for training images; None: nothing is."""
    delta: float | None
    guarantee: str
    """In words."""
    created: str
    """When it was published: UTC, ISO 8601."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            **dataclasses.asdict(self),
            "classes": list(self.classes),
            "feature_shape": list(self.feature_shape),
            "dtype": "float32",
        }


class EncoderModel:
    """E of one published encoder, frozen. Many threads may use it."""

    def __init__(
        self, network: nn.Module, normalisation: Normalisation, *, device: torch.device, arithmetic: Arithmetic = "fp32"
    ) -> None:
        self.device, self._dtype = device, _dtype(arithmetic, device)
        # The order of memory in which convolutions of a few images take two thirds of the time.
        self._network = freeze(network).to(device, self._dtype).to(memory_format=torch.channels_last)
        self._normalisation = normalisation

    @classmethod
    def load(
        cls, catalog: Catalog, version: str, *, device: str = "auto", arithmetic: Arithmetic = "fp32"
    ) -> EncoderModel:
        """From the catalog. Raises `NotPublishedError`, `CheckpointError`, `UnavailableError`."""
        record, weights = catalog.encoder(version)
        network = network_of(record, head=None, module=None).build_encoder(seed=0)
        network.load_state_dict(dict(weights))
        return cls(network, _normalisation(record), device=pick_device(device), arithmetic=arithmetic)

    def encode(self, images_BSS3: ImageArray) -> EncoderFeatures:
        """u = E(x) of (B, S, S, 3) uint8, as the feature cache holds it: (B, C, H, W) float16 on the CPU.

        Raises `NonFiniteFeatureError` for a feature that float16 does not hold.
        """
        x = to_tensor(images_BSS3, self._normalisation).to(self.device, self._dtype)
        with torch.inference_mode():
            u = self._network(x).to(torch.float16, memory_format=torch.contiguous_format)
            if not bool(torch.isfinite(u).all()):
                raise NonFiniteFeatureError("the encoder's output is NaN or larger than float16 holds")
        found: EncoderFeatures = u.cpu().numpy()
        return found


class ModuleModel:
    """g_i of one published task, frozen, and what leaves the producer behind it. Many threads may use it."""

    def __init__(
        self,
        network: nn.Module,
        card: TaskCard,
        *,
        image_size: int,
        release: PublishedRelease | None,
        device: torch.device,
        arithmetic: Arithmetic = "fp32",
    ) -> None:
        self.card, self.image_size, self.release = card, image_size, release
        self._device, self._dtype = device, _dtype(arithmetic, device)
        self._network = freeze(for_inference(network)).to(device, self._dtype)

    @classmethod
    def load(
        cls,
        catalog: Catalog,
        encoder_version: str,
        task: str,
        *,
        storage: Path,
        device: str = "auto",
        arithmetic: Arithmetic = "fp32",
    ) -> ModuleModel:
        """From the catalog, and the noise key from ``storage`` where the feature is bounded.

        Raises `PrivacyRefusal` for a private task, `NotPublishedError`, `CheckpointError`, `UnavailableError`, and
        `ConfigError` without the key.
        """
        encoder, _ = catalog.encoder(encoder_version)
        record, weights, _ = catalog.load_task(encoder.version, task)
        check_may_be_served(encoder, record)
        config = ModuleConfig.from_json(dict(record.module_config))
        return cls(
            rebuild_module(config, weights),
            card_of(encoder, record),
            image_size=encoder.image_size,
            release=_release(catalog, encoder, record, config, storage),
            device=pick_device(device),
            arithmetic=arithmetic,
        )

    def pixels(self, image: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageArray:
        """(S, S, 3) uint8 of an encoded image, as the data sets decode it. Raises `DataError` with the reason."""
        return decode_image(image, self.image_size, max_pixels=max_pixels)

    def features(self, u_BCHW: EncoderFeatures, images: ImageDigests) -> Features:
        """z as it may leave the producer: (B, C, H, W) float32, of the images with these digests.

        Raises `NonFiniteFeatureError`.
        """
        with torch.inference_mode():
            u = torch.from_numpy(np.array(u_BCHW)).to(self._device, self._dtype)
            z = self._network(u).float()
        if self.release is not None:
            z = self.release.noisy(z, images)
        found: Features = z.cpu().numpy()
        if not np.isfinite(found).all():
            raise NonFiniteFeatureError(f"a feature of task {self.card.task!r} is NaN or infinite")
        return found


class TaskModel:
    """E and g_i together: what one replica holds."""

    def __init__(self, encoder: EncoderModel, module: ModuleModel) -> None:
        self.encoder, self.module = encoder, module

    @classmethod
    def load(
        cls,
        catalog: Catalog,
        encoder_version: str,
        task: str,
        *,
        storage: Path,
        device: str = "auto",
        arithmetic: Arithmetic = "fp32",
    ) -> TaskModel:
        """As `EncoderModel.load` and `ModuleModel.load`."""
        module = ModuleModel.load(catalog, encoder_version, task, storage=storage, device=device, arithmetic=arithmetic)
        return cls(EncoderModel.load(catalog, encoder_version, device=device, arithmetic=arithmetic), module)

    def features(self, images_BSS3: ImageArray) -> Features:
        """z of (B, S, S, 3) uint8 as it may leave the producer: (B, C, H, W) float32."""
        if images_BSS3.shape[1:3] != (self.module.image_size,) * 2:
            raise DataError(f"images must have {self.module.image_size} pixels a side, got {images_BSS3.shape}")
        return self.infer(images_BSS3, ImageDigests.of(images_BSS3))

    def infer(self, images_BSS3: ImageArray, images: ImageDigests) -> Features:
        """The same, of images whose digests are known."""
        return self.module.features(self.encoder.encode(images_BSS3), images)


def check_may_be_served(encoder: EncoderRecord, record: TaskRecord) -> None:
    """Raise `PrivacyRefusal` for a task whose feature is for nobody."""
    if record.private or record.spec.name == encoder.data.get("private"):
        raise PrivacyRefusal(
            f"task {record.spec.name!r} is the private attribute of encoder {encoder.version}: it is never served"
        )


def card_of(encoder: EncoderRecord, record: TaskRecord) -> TaskCard:
    """From what the catalog says."""
    guarantee = Guarantee.from_json(dict(record.guarantee))
    config = ModuleConfig.from_json(dict(record.module_config))
    return TaskCard(
        task=record.spec.name,
        version=served_version(record),
        classes=record.spec.classes,
        feature_shape=config.feature_shape(encoder.feature_shape),
        bits_per_feature=None if config.channel is None else config.channel.bits_per_image,
        epsilon=guarantee.epsilon,
        delta=guarantee.delta if guarantee.epsilon is not None else None,
        guarantee=record.guarantee_text,
        created=record.created,
    )


def _release(
    catalog: Catalog, encoder: EncoderRecord, record: TaskRecord, config: ModuleConfig, storage: Path
) -> PublishedRelease | None:
    if config.channel is None:
        return None
    return PublishedRelease.of(encoder, record, NoiseKey.load(noise_key_path(storage, catalog.name)))


def _normalisation(encoder: EncoderRecord) -> Normalisation:
    found: Mapping[str, Any] = encoder.normalisation
    return Normalisation(mean=tuple(found["mean"]), std=tuple(found["std"]))


def _dtype(arithmetic: Arithmetic, device: torch.device) -> torch.dtype:
    if arithmetic == "fp32":
        return torch.float32
    return torch.float16 if device.type == "cuda" else torch.bfloat16
