"""Shadow models of M1: the attacker's own trainings, on known images, of networks like the one it attacks (SPEC E.4).

Axes: S shadow models, N candidates, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn

from orchestrator.errors import ConfigError, DataError
from orchestrator.evaluation.attacks.base import FloatArray, LabelArray
from orchestrator.evaluation.attacks.swap import head_logits
from orchestrator.evaluation.collect import Published
from orchestrator.evaluation.membership import BoolArray, MembershipInput
from orchestrator.models.seeding import seeded
from orchestrator.network import NetworkConfig
from orchestrator.optimisation import OptimiserConfig, set_learning_rate
from orchestrator.sampling import ShuffledBatches, derive_seed
from tasks.datasets.table import ImageArray, Normalisation
from tasks.registry import look_up
from tasks.transforms import to_tensor

MIN_SHADOWS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowConfig:
    """How the attacker's own models are trained. They are not private, whatever the target is."""

    models: int = 8
    epochs: int = 12
    min_steps: int = 100
    batch_size: int = 32
    optimiser: OptimiserConfig = OptimiserConfig()

    def __post_init__(self) -> None:
        if self.models < MIN_SHADOWS or self.models % 2:
            raise ConfigError(
                f"shadow models come in pairs, at least {MIN_SHADOWS} of them, so that each candidate is in half; "
                f"got {self.models}"
            )
        if min(self.epochs, self.min_steps, self.batch_size) < 1:
            raise ConfigError("epochs, min_steps and batch_size of shadow models must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The images in question, and what the attacker has besides."""

    images: ImageArray = field(repr=False)
    """(N, S, S, 3) uint8."""
    labels: LabelArray = field(repr=False)
    extra_images: ImageArray = field(repr=False)
    """The attacker's own, in every shadow model's training set; may be empty."""
    extra_labels: LabelArray = field(repr=False)
    normalisation: Normalisation
    build: Callable[[int], nn.Module] = field(repr=False)
    """A fresh network of the target's kind from a seed: normalised images to (B, K) logits. Picklable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowJob:
    """One training. Small: images travel once, with the function that takes jobs."""

    number: int
    config: ShadowConfig
    seed: int

    def lost(self, reason: str) -> ShadowAnswer:
        """What a runner answers with for a job whose process died."""
        return ShadowAnswer(number=self.number, crashed=reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowAnswer:
    """What one shadow model says about the candidates."""

    number: int
    logits: FloatArray | None = field(default=None, repr=False)
    """(N, K)."""
    crashed: str | None = None


ShadowRunner = Callable[[Callable[[ShadowJob], ShadowAnswer], Sequence[ShadowJob]], Iterable[ShadowAnswer]]


def shadow_members(n: int, *, config: ShadowConfig, seed: int) -> BoolArray:
    """(S, N): each candidate is in exactly half of the models, independently of the others."""
    rng = np.random.default_rng(derive_seed(seed, "shadow members"))
    return rng.permuted(np.tile(np.arange(config.models) < config.models // 2, (n, 1)), axis=1).T.copy()


def train_shadows(
    candidates: Candidates, *, config: ShadowConfig, seed: int, run: ShadowRunner = map
) -> tuple[FloatArray, BoolArray]:
    """``shadow_logits`` and ``shadow_member`` of a `MembershipInput`.

    A model that crashes is left out; raises `DataError` if fewer than four remain.
    """
    jobs = [ShadowJob(number=number, config=config, seed=seed) for number in range(config.models)]
    answers = list(run(partial(_train_shadow, candidates), jobs))
    whole = [answer for answer in answers if answer.logits is not None]
    if len(whole) < MIN_SHADOWS:
        reasons = "; ".join(sorted({answer.crashed or "" for answer in answers} - {""}))
        raise DataError(f"{len(whole)} of {config.models} shadow models came through: {reasons}")
    members = shadow_members(len(candidates.labels), config=config, seed=seed)
    logits = np.stack([answer.logits for answer in whole if answer.logits is not None])
    return logits, members[[answer.number for answer in whole]]


def _train_shadow(candidates: Candidates, job: ShadowJob) -> ShadowAnswer:
    """What a worker does."""
    try:
        inside = shadow_members(len(candidates.labels), config=job.config, seed=job.seed)[job.number]
        images = np.concatenate([candidates.images[inside], candidates.extra_images])
        labels = np.concatenate([candidates.labels[inside], candidates.extra_labels])
        seed = derive_seed(job.seed, "shadow", job.number)
        with seeded(seed):
            network = candidates.build(seed)
        _fit(network, to_tensor(images, candidates.normalisation), torch.from_numpy(labels), job.config, seed)
        return ShadowAnswer(number=job.number, logits=_answers(network, candidates))
    except Exception as error:
        return ShadowAnswer(number=job.number, crashed=f"{type(error).__name__}: {error}")


def _fit(network: nn.Module, x: torch.Tensor, y: torch.Tensor, config: ShadowConfig, seed: int) -> None:
    batches = ShuffledBatches(len(x), batch_size=config.batch_size, seed=seed)
    optimiser = config.optimiser.build(list(network.parameters()))
    total = max(config.min_steps, config.epochs * batches.steps_per_epoch)
    network.train()
    for step in range(total):
        ids = torch.from_numpy(batches.ids(step))
        set_learning_rate(optimiser, config.optimiser.learning_rate(step, total))
        optimiser.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(network(x[ids]), y[ids]).backward()
        optimiser.step()


@torch.no_grad()
def _answers(network: nn.Module, candidates: Candidates) -> FloatArray:
    network.eval()
    parts = [
        network(to_tensor(candidates.images[i : i + 256], candidates.normalisation))
        for i in range(0, len(candidates.images), 256)
    ]
    logits: FloatArray = torch.cat(parts).numpy()
    if not np.isfinite(logits).all():
        raise FloatingPointError("a shadow model diverged: its answers hold NaN or infinity")
    return logits


MEMBERSHIP_BUDGETS: Mapping[str, ShadowConfig | None] = {"quick": None, "full": ShadowConfig()}
"""quick: thresholds only, which train nothing; full: eight shadow models too."""


def membership_budget(name: str) -> ShadowConfig | None:
    """The one of `MEMBERSHIP_BUDGETS`. Raises `UnknownNameError`."""
    return look_up(MEMBERSHIP_BUDGETS, "membership budget", name)


@dataclass(frozen=True, kw_only=True, slots=True)
class SameNetworks:
    """Builds networks of the kind that was published for a task, from other seeds."""

    network: NetworkConfig
    task: str
    n_outputs: int
    image_size: int

    def __call__(self, seed: int) -> nn.Module:
        """Encoder, module and head in a row, with noise between where the feature is bounded."""
        modules = self.network.build_modules([self.task], self.image_size, seed=seed)
        heads = self.network.build_heads({self.task: self.n_outputs}, self.image_size, seed=seed)
        channel = self.network.module_config(self.image_size).channel
        noise = [] if channel is None else [_Noise(channel.noise, seed=seed)]
        return nn.Sequential(self.network.build_encoder(seed=seed), modules[self.task], *noise, heads[self.task])


class _Noise(nn.Module):
    """The channel of a bounded feature, as an attacker imitates it: noise of its own, in training and afterwards."""

    def __init__(self, tau: float, *, seed: int) -> None:
        super().__init__()
        self.tau, self._random = tau, torch.Generator().manual_seed(seed)

    def forward(self, s: torch.Tensor) -> torch.Tensor:
        return s + self.tau * torch.randn(s.shape, generator=self._random)


def membership_of(
    published: Published, task: str, *, shadows: ShadowConfig | None, seed: int, run: ShadowRunner = map
) -> MembershipInput:
    """What M1 takes for one published task: as many training as test rows, drawn at random.

    The attacker's own subset is in every shadow model's training set. Raises `DataError` for a task without a head.
    """
    given, table, splits = published.features[task], published.opened.table, published.opened.splits
    if given.head is None:
        raise DataError(f"the head of {task!r} is a remote tenant's: its answers cannot be had here")
    rng = np.random.default_rng(derive_seed(seed, "membership candidates"))
    n = min(len(splits.train), len(splits.test))
    chosen = {subset: rng.permutation(len(splits.subset(subset)))[:n] for subset in ("train", "test")}
    rows = np.concatenate([splits.subset(subset)[ids] for subset, ids in chosen.items()])
    labels = table.task_labels(task)
    z = np.concatenate([given.features[subset][ids] for subset, ids in chosen.items()])
    shadow_logits, shadow_member = None, None
    if shadows is not None:
        candidates = Candidates(
            images=table.images[rows],
            labels=labels[rows],
            extra_images=table.images[splits.attacker],
            extra_labels=labels[splits.attacker],
            normalisation=table.normalisation,
            build=SameNetworks(
                network=published.network_of(task),
                task=task,
                n_outputs=given.spec.n_outputs,
                image_size=table.images.shape[1],
            ),
        )
        shadow_logits, shadow_member = train_shadows(candidates, config=shadows, seed=seed, run=run)
    return MembershipInput(
        logits=head_logits(given.head, z),
        labels=labels[rows],
        member=np.arange(len(rows)) < n,
        shadow_logits=shadow_logits,
        shadow_member=shadow_member,
        seed=seed,
    )
