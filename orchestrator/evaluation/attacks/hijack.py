"""H1, feature-space hijacking: a consumer that trains the producer's network to give images away (SPEC E.4).

Instead of the gradient of its task, the consumer sends one that makes z look like the output of an encoder of its own,
whose inverse it has (Pasquini, Ateniese and Bernaschi, "Unleashing the Tiger", CCS 2021). It needs images of the same
kind, but neither labels nor the producer's weights.

    public x --pilot--> z' --decoder--> x          z' and the z that arrive look alike to the critic:
    private x --E, g--> z --decoder--> private x   dL/dz = -d critic(z)/dz

Axes: N images or B of a batch, C channels, H and W of the feature, S the side of an image.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.assembly import SessionPlan, TrainingData
from orchestrator.consumer import ConsumerConfig
from orchestrator.errors import ConfigError, QuarantineError, UnknownNameError
from orchestrator.local import LocalConsumer, LocalProducer
from orchestrator.models.seeding import seeded
from orchestrator.ports import Pending, Ready
from orchestrator.sampling import ShuffledBatches, derive_seed
from orchestrator.session import Session
from orchestrator.wire import FeatureBatch, FeatureGradient, TaskOffer
from tasks.datasets.table import Normalisation
from tasks.transforms import to_tensor

_TO_ONE: Final = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""Pixels to [-1, 1], the range of the decoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HijackConfig:
    """How hard the attacker tries, and how well it hides."""

    width: int = 64
    """Channels of its networks."""
    learning_rate: float = 1e-3
    """Of pilot and decoder (Adam)."""
    critic_learning_rate: float = 5e-4
    """Of the critic (Adam without momentum)."""
    critic_steps: int = 2
    """A step of the protocol."""
    gradient_penalty: float = 10.0
    """Of WGAN-GP."""
    sincerity: float = 0.0
    """How much of its own task's gradient is mixed in, measured by its norm: 0 is the attack as published, and an
    attacker that knows of the guard hides behind more."""

    decoder_epochs: int = 40
    """Of the decoder that the attack is compared with."""

    def __post_init__(self) -> None:
        if min(self.width, self.critic_steps, self.decoder_epochs) < 1:
            raise ConfigError(
                "width, critic_steps and decoder_epochs must be at least 1, got "
                f"{self.width}, {self.critic_steps} and {self.decoder_epochs}"
            )
        if self.sincerity < 0:
            raise ConfigError(f"sincerity must be >= 0, got {self.sincerity}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """How close images come to the private ones, of which ``n`` were tried. Pixels count from 0 to 1."""

    n: int
    mse: float
    psnr: float
    """dB; 10 log10(1 / mse)."""
    ssim: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HijackRun:
    """One session with the malicious consumer in it."""

    guard: bool
    steps: int
    """In which the attacker was listened to, or was found out. For the rest it learns from its public images alone."""
    stopped: str | None
    """Why the guard stopped it; None if it did not."""
    private: Reconstruction
    """Of every training image that it was sent a feature of, from the last one."""
    own: Reconstruction
    """Of the same images through its own pilot: what it would get if the hijacking were perfect."""
    others: Mapping[str, float]
    """Accuracy of the other tasks on the test subset after that many steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HijackReport:
    """What hijacking gives away with the guard off and on, beside what is known or had without it."""

    task: str
    """The malicious consumer's."""
    encoder: str
    """live: E is trained by the consumers' gradients; frozen: only g_i is."""
    image_size: int
    feature_shape: tuple[int, ...]
    steps: int
    """Of the session without the guard."""
    attack: HijackConfig
    mean_image: Reconstruction
    """The mean public image, in place of every private one."""
    decoder: Reconstruction
    """Without hijacking: a decoder trained on public images and their features, after honest training. A consumer can
    have such pairs only if somebody lets it send images of its own."""
    runs: tuple[HijackRun, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def measure_hijack(
    plan: SessionPlan, *, task: str, attack: HijackConfig | None = None, steps: int = 400, seed: int = 0
) -> HijackReport:
    """Hijack ``task`` in the session of ``plan``, in this process: with the guard off for ``steps``, and with it on.

    The attacker's public images are those of the plan's attacker subset; the private ones are the training images.
    """
    if task not in plan.data.specs:
        raise UnknownNameError("task of the plan", task, plan.data.specs)
    attack = attack or HijackConfig()
    epochs = math.ceil(steps / plan.steps_per_epoch)
    plan = replace(plan, config=replace(plan.config, epochs=epochs))
    public, private = _images(plan.data, "attacker"), _images(plan.data, "train")
    runs = []
    for guard in (False, True):
        guarded = replace(plan, config=replace(plan.config, guard=guard))
        runs.append(_hijacked(guarded, task, public, private, attack, steps=steps, seed=seed))
    return HijackReport(
        task=task,
        encoder="frozen" if plan.frozen else "live",
        image_size=plan.data.image_size,
        feature_shape=plan.shape,
        steps=steps,
        attack=attack,
        mean_image=reconstruction(public.mean(dim=0).expand_as(private), private),
        decoder=_decoded(plan, task, public, private, attack, steps=steps, seed=seed),
        runs=tuple(runs),
    )


def reconstruction(guessed: Tensor, images: Tensor) -> Reconstruction:
    """Of (N, 3, S, S) in [-1, 1]."""
    from pytorch_msssim import ssim

    a, b = guessed / 2 + 0.5, images / 2 + 0.5
    mse = float((a - b).square().mean())
    likeness = float(ssim(a, b, data_range=1.0, win_size=7))
    return Reconstruction(n=len(images), mse=mse, psnr=-10 * math.log10(max(mse, 1e-12)), ssim=likeness)


def _hijacked(
    plan: SessionPlan, task: str, public: Tensor, private: Tensor, attack: HijackConfig, *, steps: int, seed: int
) -> HijackRun:
    session = _session(plan, {task: (public, attack)}, seed=seed)
    attacker = session.consumers[task]
    assert isinstance(attacker, HijackingConsumer)
    stopped: str | None = None
    try:
        while session.step < steps and task not in session.quarantined:
            session.train_step()
        stopped = session.quarantined.get(task)
    except QuarantineError as error:  # it was the only tenant
        stopped = error.reasons[task]
    attacker.go_on(steps - len(attacker.answered))
    ids = sorted(attacker.seen)
    others = session.evaluate("test") if set(session.live) - {task} else {}
    return HijackRun(
        guard=plan.config.guard,
        steps=len(attacker.answered),
        stopped=stopped,
        private=reconstruction(attacker.open(_stack(attacker.seen, ids)), private[ids]),
        own=reconstruction(attacker.open(attacker.imitate(private[ids])), private[ids]),
        others={t: float(r.metrics["accuracy"]) for t, r in others.items() if t != task},
    )


def _decoded(
    plan: SessionPlan, task: str, public: Tensor, private: Tensor, attack: HijackConfig, *, steps: int, seed: int
) -> Reconstruction:
    session = _session(plan, {}, seed=seed)
    while session.step < steps:
        session.train_step()
    z = {
        s: torch.from_numpy(session.producer.evaluation_features(s)[task].result().features)
        for s in ("attacker", "train")
    }
    mean, std = z["attacker"].mean(dim=(0, 2, 3), keepdim=True), z["attacker"].std(dim=(0, 2, 3), keepdim=True)
    z = {subset: (value - mean) / std.clamp_min(1e-6) for subset, value in z.items()}
    channels, side, _ = plan.shape
    with seeded(derive_seed(seed, "decoder")):
        network = decoder(channels, side, plan.data.image_size, width=attack.width)
    batches = ShuffledBatches(len(public), batch_size=64, seed=derive_seed(seed, "decoder", "batches"))
    total = attack.decoder_epochs * batches.steps_per_epoch
    optimizer = torch.optim.Adam(network.parameters(), attack.learning_rate, fused=True)
    for step in range(total):
        ids = torch.from_numpy(batches.ids(step))
        loss = nn.functional.mse_loss(network(z["attacker"][ids]), public[ids])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return reconstruction(torch.cat([network(part) for part in z["train"].split(256)]), private)


def _session(plan: SessionPlan, hijacked: Mapping[str, tuple[Tensor, HijackConfig]], *, seed: int) -> Session:
    """Ready for step 0; honest consumers for the tasks that nobody hijacks."""
    producer = LocalProducer(plan)
    consumers: list[LocalConsumer] = []
    for task, offer in producer.offers().items():
        config = plan.consumer_config(task)
        if task in hijacked:
            public, attack = hijacked[task]
            consumers.append(HijackingConsumer(offer, config, public, attack, seed=seed))
        else:
            consumers.append(LocalConsumer(offer, config, device="cpu"))
    session = Session(producer, consumers, steps_per_epoch=plan.steps_per_epoch, epochs=plan.config.epochs)
    session.start()
    return session


def _images(data: TrainingData, subset: str) -> Tensor:
    """In [-1, 1], however the producer normalises what it feeds to E."""
    return to_tensor(data.images[data.rows[subset]], _TO_ONE)


def _stack(seen: Mapping[int, NDArray[np.float32]], ids: list[int]) -> Tensor:
    return torch.from_numpy(np.stack([seen[i] for i in ids]))


class HijackingConsumer(LocalConsumer):
    """A `ConsumerPort` that behaves in everything but the gradients that it returns.

    It keeps the last feature that it was sent of every training image: that is what it opens in the end.
    """

    def __init__(
        self, offer: TaskOffer, config: ConsumerConfig, public: Tensor, attack: HijackConfig, *, seed: int
    ) -> None:
        """``public``: (N, 3, S, S) images that are like the private ones, in [-1, 1]."""
        super().__init__(offer, config, device="cpu")
        self.attack, self._public = attack, public
        channels, side, _ = offer.contract.shape
        with seeded(derive_seed(seed, "hijack")):
            self.pilot = _pilot(public.shape[-1], channels, side, width=attack.width)
            self.decoder = decoder(channels, side, public.shape[-1], width=attack.width)
            self.critic = _critic(channels, side, width=attack.width)
        own = [*self.pilot.parameters(), *self.decoder.parameters()]
        self._optimizer = torch.optim.Adam(own, attack.learning_rate, fused=True)
        self._critic_optimizer = torch.optim.Adam(
            self.critic.parameters(), attack.critic_learning_rate, betas=(0.0, 0.9), fused=True
        )
        self._batches = ShuffledBatches(len(public), batch_size=64, seed=derive_seed(seed, "hijack", "batches"))
        self._random = torch.Generator().manual_seed(derive_seed(seed, "hijack", "mix"))
        self._answer: FeatureGradient | None = None
        self.answered: set[int] = set()
        """The steps that it was asked for."""
        self.seen: dict[int, NDArray[np.float32]] = {}
        """Example id to the last feature of it."""

    def learn(self, batch: Pending[FeatureBatch]) -> Ready:
        """The gradient that pulls z to where the decoder can read it."""
        received = batch.result()
        if self._answer is not None and self._answer.step == received.step:
            return Ready(self._answer)
        sincere = self.consumer.learn(received)
        self.answered.add(received.step)
        self.seen.update(zip(received.example_ids.tolist(), received.features, strict=True))
        z = torch.tensor(received.features)
        ids = torch.from_numpy(self._batches.ids(received.step))
        x = self._public[ids]
        self._learn_to_invert(x)
        self._learn_to_tell_apart(z, x)
        hijacking = self._hijack(z)
        mixed = hijacking + self.attack.sincerity * _of_norm(torch.from_numpy(sincere.gradient), hijacking.norm())
        self._answer = FeatureGradient(
            contract=sincere.contract, step=sincere.step, gradient=mixed.numpy(), loss=sincere.loss
        )
        return Ready(self._answer)

    def state_dict(self) -> Ready:
        """Nobody resumes an attacker."""
        return Ready({})

    def load_state_dict(self, state: Mapping[str, Any]) -> Ready:
        """Nobody resumes an attacker."""
        return Ready(None)

    def go_on(self, steps: int) -> None:
        """Train pilot and decoder further, on public images, when there is no session any more."""
        for step in range(len(self.answered), len(self.answered) + steps):
            self._learn_to_invert(self._public[torch.from_numpy(self._batches.ids(step))])

    @torch.no_grad()
    def open(self, z: Tensor) -> Tensor:
        """(N, 3, S, S) images in [-1, 1] from features."""
        return torch.cat([self.decoder(part) for part in z.split(256)])

    @torch.no_grad()
    def imitate(self, x: Tensor) -> Tensor:
        """The features (N, C, H, W) of images, as its own encoder makes them."""
        return torch.cat([self.pilot(part) for part in x.split(256)])

    def _learn_to_invert(self, x: Tensor) -> None:
        loss = nn.functional.mse_loss(self.decoder(self.pilot(x)), x)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()

    def _learn_to_tell_apart(self, z: Tensor, x: Tensor) -> None:
        with torch.no_grad():
            mine = self.pilot(x)
        n = min(len(z), len(mine))
        for _ in range(self.attack.critic_steps):
            share = torch.rand(n, 1, 1, 1, generator=self._random)
            between = (share * z[:n] + (1 - share) * mine[:n]).requires_grad_()
            (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
            penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
            loss = self.critic(z).mean() - self.critic(mine).mean() + self.attack.gradient_penalty * penalty
            self._critic_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._critic_optimizer.step()

    def _hijack(self, z: Tensor) -> Tensor:
        leaf = z.clone().requires_grad_()
        gradient: Tensor = torch.autograd.grad(-self.critic(leaf).mean(), leaf)[0]
        return gradient


def _of_norm(gradient: Tensor, norm: Tensor) -> Tensor:
    scaled: Tensor = gradient * (norm / gradient.norm().clamp_min(1e-12))
    return scaled


def _doublings(image_size: int, side: int) -> int:
    doublings = round(math.log2(image_size / side))
    if side * 2**doublings != image_size:
        raise ConfigError(f"the attack needs images whose side is a power of two times the feature's, {side}")
    return doublings


def _pilot(image_size: int, channels: int, side: int, *, width: int) -> nn.Module:
    """(N, 3, S, S) to (N, C, H, W), without a non-linearity, as the original: what is linear is easily inverted."""
    layers: list[nn.Module] = []
    before = 3
    for _ in range(_doublings(image_size, side)):
        layers.append(nn.Conv2d(before, width, 3, stride=2, padding=1))
        before = width
    return nn.Sequential(*layers, nn.Conv2d(before, channels, 3, padding=1))


def decoder(channels: int, side: int, image_size: int, *, width: int) -> nn.Module:
    """(N, C, H, W) to (N, 3, S, S) in (-1, 1)."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for _ in range(_doublings(image_size, side)):
        layers += [nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())


def _critic(channels: int, side: int, *, width: int) -> nn.Module:
    """(N, C, H, W) to (N, 1)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv0=nn.Conv2d(channels, 2 * width, 3, padding=1))
    layers["act0"] = nn.LeakyReLU(0.2)
    while side > 2:
        number, side = len(layers), math.ceil(side / 2)
        layers[f"conv{number}"] = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        layers[f"act{number}"] = nn.LeakyReLU(0.2)
    layers["flatten"] = nn.Flatten()
    layers["out"] = nn.Linear(2 * width * side * side, 1)
    return nn.Sequential(layers)
