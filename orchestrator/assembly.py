"""A session's parties, built from plain data: what travels to a Ray actor is a plan, and the actor builds from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.checkpoint import weights_hash
from orchestrator.consumer import ConsumerConfig
from orchestrator.errors import ConfigError
from orchestrator.feature_cache import FeatureCache
from orchestrator.guard import GradientGuard, GuardConfig
from orchestrator.inputs import CachedInputs, ImageInputs, Rows
from orchestrator.models.modules import ModuleConfig, rebuild_module
from orchestrator.network import FeatureNetwork, NetworkConfig, freeze, pick_device
from orchestrator.optimisation import OptimiserConfig
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.dissimilarity import Dissimilarity, DissimilarityConfig
from orchestrator.privacy.plan import DpPlan
from orchestrator.producer import InputSource, Producer, build_offers
from orchestrator.release import NoisePlan, SessionRelease
from orchestrator.sampling import derive_seed
from orchestrator.shaping import Shaping, ShapingPlan
from orchestrator.updates import batch_sampler, build_update
from tasks.datasets.table import ImageTable, Normalisation
from tasks.spec import TaskSpec

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """How phase 2 trains modules and heads."""

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 64
    """Examples per step."""
    lr: float = 1e-3
    """Learning rate of AdamW, at its highest."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    schedule: str = "cosine"
    """cosine: falls to zero over the training; constant: the paper's."""
    guard: bool = True
    """Put a task into quarantine, and go on with the others, if its tenant returns what is no gradient of the task."""
    conflict_epochs: int = 2
    """Further epochs when somebody else published a task meanwhile: the new pair is trained apart before publishing."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.conflict_epochs) < 1:
            raise ConfigError(
                "epochs, batch size and conflict epochs must be at least 1, got "
                f"{self.epochs}, {self.batch_size} and {self.conflict_epochs}"
            )
        if self.schedule not in {"cosine", "constant"}:
            raise ConfigError(f"schedule must be cosine or constant, got {self.schedule!r}")
        OptimiserConfig(lr=self.lr, weight_decay=self.weight_decay)

    @property
    def optimiser(self) -> OptimiserConfig:
        """For modules and heads alike."""
        schedule: Any = self.schedule
        return OptimiserConfig(lr=self.lr, weight_decay=self.weight_decay, schedule=schedule)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """The producer's data, cut into subsets. It stays in the producer's trust domain."""

    images: NDArray[np.uint8] = field(repr=False)
    rows: Rows = field(repr=False)
    labels: Mapping[str, Mapping[str, NDArray[np.int64]]] = field(repr=False)
    """Task to subset to labels in example-id order."""
    specs: Mapping[str, TaskSpec]
    normalisation: Normalisation
    flip: bool
    fingerprint: str

    @classmethod
    def of(cls, table: ImageTable, rows: Rows, tasks: tuple[str, ...]) -> TrainingData:
        """The part of a table that some tasks need."""
        return cls(
            images=table.images,
            rows=rows,
            labels={t: {s: table.task_labels(t)[r] for s, r in rows.items()} for t in tasks},
            specs={t: table.spec(t) for t in tasks},
            normalisation=table.normalisation,
            flip=table.flip,
            fingerprint=table.fingerprint,
        )

    @property
    def image_size(self) -> int:
        """Side of the square images."""
        return int(self.images.shape[1])


@dataclass(frozen=True, kw_only=True)
class SessionPlan:
    """Everything from which one session's producer and consumers are built."""

    data: TrainingData
    network: NetworkConfig
    config: SessionConfig
    dissimilarity: DissimilarityConfig
    seed: int
    encoder: Weights | None = field(default=None, repr=False)
    """Weights of E to start from, or to hold fixed; None starts from a fresh E."""
    frozen: bool = True
    """Whether E is fixed, so that its features come from the cache."""
    fixed_modules: Mapping[str, tuple[ModuleConfig, Weights]] = field(default_factory=dict, repr=False)
    """Modules of earlier tasks and of the private branch: they are kept apart from, and never changed."""
    modules: Mapping[str, Weights] | None = field(default=None, repr=False)
    """Weights of the modules of this session's own tasks, where they are trained already and only heads are to be."""
    dp: DpPlan | None = None
    """Clips and noises E and every g_i in this session (input obfuscation with live consumers)."""
    cache_root: Path | None = None
    """Where the feature cache is; needed when E is frozen."""
    use_cache: bool = True
    """False recomputes the frozen encoder for every batch: what the cache is measured against."""
    device: str = "auto"
    threads: int | None = None
    """PyTorch threads of the producer; None leaves the process as it is."""
    noise: NoisePlan | None = None
    """Of bounded features, which must have it; None for others."""
    shaping: ShapingPlan = ShapingPlan()
    """What is asked of bounded features besides what their tenants ask."""

    def __post_init__(self) -> None:
        if (self.channel is None) != (self.noise is None):
            raise ConfigError("bounded features need noise, and no others have any: give network and noise together")
        if self.channel is not None and self.dp is not None:
            raise ConfigError("bounded features are not trained under DP: leave out one of the two")
        if self.shaping.asks and self.channel is None:
            raise ConfigError("a rate and named secrets are of bounded features: give --task-privacy bounded")
        _ = self.shape  # or the features do not fit
        if self.frozen and self.encoder is None:
            raise ConfigError("a frozen encoder needs weights")
        if self.dp is not None and self.dissimilarity.omega > 0:
            raise ConfigError(
                "input obfuscation trains without a dissimilarity term (Algorithm 2, lines 2-4): set --omega 0, "
                "or use --algorithm both"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every feature that this session hands out."""
        return self.network.task_shape(self.data.image_size)

    @property
    def channel(self) -> ChannelConfig | None:
        """Of every feature of this session; None: they are not bounded."""
        return self.network.module_config(self.data.image_size).channel

    @property
    def kept_apart_from(self) -> Mapping[str, tuple[ModuleConfig, Weights]]:
        """The fixed modules whose features have the shape of this session's, so that a similarity is defined."""
        return comparable(self.fixed_modules, self.network, self.data.image_size)

    @property
    def steps_per_epoch(self) -> int:
        """Of the sampler that the producer will use."""
        n = len(self.data.rows["train"])
        return batch_sampler(self.dp, n=n, batch_size=self.config.batch_size, seed=self.seed).steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Of the whole session."""
        return self.steps_per_epoch * self.config.epochs

    @property
    def n_features(self) -> int:
        """That each tenant is sent: training and validation images once an epoch (or on average), test images once."""
        train, validation, test = (len(self.data.rows.get(name, ())) for name in ("train", "validation", "test"))
        return self.config.epochs * (train + validation) + test

    def consumer_config(self, task: str) -> ConsumerConfig:
        """What a hosted tenant trains with."""
        return ConsumerConfig(
            head=self.network.tenant_head,
            optimiser=self.config.optimiser,
            total_steps=self.total_steps,
            seed=derive_seed(self.seed, "consumer", task),
        )


def build_producer(plan: SessionPlan) -> Producer:
    """The producer of a session, ready for step 0."""
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    device = pick_device(plan.device)
    data, size = plan.data, plan.data.image_size
    encoder = plan.network.build_encoder(seed=plan.seed)
    if plan.encoder is not None:
        encoder.load_state_dict(dict(plan.encoder))
    if plan.frozen:
        freeze(encoder)
    live: nn.Module | None
    source: InputSource
    if plan.frozen and plan.use_cache:
        live = None
        source = cached_inputs(data, encoder.to(device), device, cache_root=plan.cache_root, seed=plan.seed)
    else:
        live = encoder
        source = ImageInputs(
            data.images, data.rows, normalisation=data.normalisation, flip=data.flip, seed=plan.seed, device=device
        )
    modules = plan.network.build_modules(data.specs, size, seed=plan.seed)
    for task, weights in (plan.modules or {}).items():
        modules[task].load_state_dict(dict(weights))
        freeze(modules[task])
    network = FeatureNetwork(live, modules).to(device)
    accountant = plan.dp.accountant() if plan.dp else None
    sampler = batch_sampler(plan.dp, n=len(data.rows["train"]), batch_size=plan.config.batch_size, seed=plan.seed)
    return Producer(
        offers=build_offers(
            specs=data.specs,
            shape=plan.shape,
            backbone=plan.network.backbone,
            split_index=plan.network.split_index,
            n_train=len(data.rows["train"]),
            n_features=plan.n_features,
            bits_per_feature=None if plan.channel is None else plan.channel.bits_per_image,
        ),
        source=source,
        network=network,
        fixed_network=fixed_network(plan.kept_apart_from, live, device),
        update=build_update(network, plan.config.optimiser, plan=plan.dp, accountant=accountant, sampler=sampler),
        sampler=sampler,
        total_steps=plan.total_steps,
        optimiser=plan.config.optimiser,
        dissimilarity=Dissimilarity(plan.dissimilarity),
        labels=data.labels,
        accountant=accountant,
        delta=plan.dp.delta if plan.dp else 0.0,
        guard=GradientGuard(GuardConfig()) if plan.config.guard else None,
        release=_release(plan),
        shaping=_shaping(plan, device),
    )


def _release(plan: SessionPlan) -> SessionRelease | None:
    if plan.channel is None or plan.noise is None:
        return None
    return SessionRelease(plan.noise, plan.channel, images=plan.data.images, rows=plan.data.rows)


def _shaping(plan: SessionPlan, device: torch.device) -> Shaping | None:
    """None also where the modules are trained already: then only heads are to be."""
    if plan.channel is None or not plan.shaping.asks or plan.modules is not None:
        return None
    return Shaping(
        plan.shaping,
        plan.channel,
        specs=plan.data.specs,
        labels={task: labels["train"] for task, labels in plan.data.labels.items()},
        feature_shape=plan.shape,
        total_steps=plan.total_steps,
        seed=derive_seed(plan.seed, "shaping"),
        device=device,
    )


def cache_key(encoder: nn.Module, *, fingerprint: str, image_size: int) -> str:
    """Under which the feature cache holds an encoder's features of one data set, for sessions and evaluation alike."""
    return f"{weights_hash(encoder.state_dict())[:16]}-{fingerprint[:16]}-{image_size}"


def cached_inputs(
    data: TrainingData, encoder: nn.Module, device: torch.device, *, cache_root: Path | None, seed: int
) -> CachedInputs:
    """The frozen encoder's features of the whole table, computed now or found in the cache."""
    if cache_root is None:
        raise ConfigError("a session on a frozen encoder needs a folder for the feature cache")
    cache = FeatureCache(cache_root)
    key = cache_key(encoder, fingerprint=data.fingerprint, image_size=data.image_size)

    def features(*, mirrored: bool) -> NDArray[np.float16]:
        return cache.encoder_features(
            encoder, data.images, key=key, normalisation=data.normalisation, mirrored=mirrored
        )

    mirrored = features(mirrored=True) if data.flip else None
    return CachedInputs(features(mirrored=False), mirrored, data.rows, seed=seed, device=device)


def comparable(
    fixed: Mapping[str, tuple[ModuleConfig, Weights]], network: NetworkConfig, image_size: int
) -> dict[str, tuple[ModuleConfig, Weights]]:
    """Those whose features have the shape of the network's: a vector and a map have no similarity."""
    u, shape = network.shape(image_size), network.task_shape(image_size)
    return {task: module for task, module in fixed.items() if module[0].feature_shape(u) == shape}


def fixed_network(
    fixed: Mapping[str, tuple[ModuleConfig, Weights]], encoder: nn.Module | None, device: torch.device
) -> nn.Module | None:
    """The modules that are kept apart from, behind the same input as the trainable ones; None if there are none."""
    if not fixed:
        return None
    modules = {task: rebuild_module(config, state) for task, (config, state) in fixed.items()}
    return freeze(FeatureNetwork(encoder, modules).to(device))
