"""DP-SGD for a network whose loss lives elsewhere: per-example clipping and noise from the gradients at its outputs.

    forward(x) -> z, ...   ||party boundary||   dL/dz, ... -> step

L is the mean over the batch that was sent. All outputs are back-propagated at once, so an image that serves several
tasks is clipped once, jointly over all weights, and the sensitivity of the sum is C (DP-SGD, Abadi et al. 2016; the
paper's Algorithm 1 draws the noise once per image, a slip).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from orchestrator.errors import CheckpointError, ConfigError, PrivacyRefusal, ProtocolError
from orchestrator.privacy.accounting import Accountant, AccountantKind, load_opacus
from orchestrator.privacy.clipping import PartClip
from orchestrator.privacy.engines import engine_for
from orchestrator.shard import WHOLE, Shard

DpMode: TypeAlias = Literal[
    "surrogate_then_freeze",
    "surrogate_dp_modules",
    "whole",
    "public_head",
    "frozen_head",
    "two_budget",
    "encoder_only_paper",
]
SurrogateKind: TypeAlias = Literal["linear", "backbone"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DpBudget:
    """How one training is made private for the training images (DP-SGD)."""

    epsilon: float | None = None
    """Privacy budget; smaller is more private. None trains without DP."""
    delta: float | None = None
    """Probability with which the guarantee may fail. None: the largest power of ten below 1 / number of images."""
    max_grad_norm: float = 1.2
    """Clipping norm C: the largest L2 norm of one image's gradient over all covered weights. The paper uses 1.2."""
    accountant: AccountantKind = "prv"
    """prv is tighter; rdp is what the paper most likely used."""
    surrogate: SurrogateKind = "linear"
    """The stand-in head of surrogate_then_freeze. linear has far fewer weights to clip and noise than the rest of the
    backbone."""
    noise_seed: int | None = None
    """None: the noise comes from the operating system. A fixed seed makes the run repeatable, and the guarantee then
    holds only towards those who do not know it."""

    def __post_init__(self) -> None:
        if self.epsilon is not None and not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ConfigError(
                f"epsilon must be a finite number > 0, got {self.epsilon}; leave it out to train without DP"
            )
        if self.delta is not None and not 0 < self.delta < 1:
            raise ConfigError(
                f"delta must be > 0 and < 1, got {self.delta}; leave it out for a power of ten below 1 / images"
            )
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise ConfigError(
                f"max_grad_norm must be a finite number > 0, got {self.max_grad_norm}; the paper uses 1.2"
            )
        if self.noise_seed is not None and self.noise_seed < 0:
            raise ConfigError(f"noise_seed must be >= 0, got {self.noise_seed}; leave it out for fresh noise")
        _check_choice("accountant", self.accountant, get_args(AccountantKind))
        _check_choice("surrogate", self.surrogate, get_args(SurrogateKind))

    @property
    def mode(self) -> DpMode:
        """A budget alone is for modules: of a task that is added to an encoder."""
        return "surrogate_dp_modules"

    @property
    def head_apart(self) -> tuple[float, float] | None:
        """(share of 1 / sigma^2, clipping norm) of a head that is clipped and noised apart from the rest."""
        return None

    def delta_for(self, n_train: int) -> float:
        """The delta of a training on so many images."""
        return self.delta if self.delta is not None else default_delta(n_train)


@dataclass(frozen=True, kw_only=True, slots=True)
class DpConfig(DpBudget):
    """How the training images are protected from whoever gets the weights (DP-SGD), and which weights are covered."""

    dp_mode: DpMode = "surrogate_then_freeze"
    """surrogate_then_freeze: the encoder is trained with a stand-in head, all under DP, then frozen;
    surrogate_dp_modules: then the modules too, each with a stand-in head, and epsilon is for both trainings together;
    whole: encoder, module and head under DP; two_budget: the same, head and rest clipped and noised apart;
    public_head: the head learns from --public-data alone; frozen_head: the head stays as it was at the start;
    encoder_only_paper: the head is trained without noise, and NOTHING is guaranteed."""
    public_data: str | None = None
    """With public_head: images that nobody has to protect, none of them a training image, with the same label column.
    digits or parquet:PATH."""
    head_weights: Path | None = None
    """With frozen_head: a safetensors file of a head that never saw these images. None: a random head."""
    head_budget: float = 0.5
    """With two_budget: the head's share of 1 / sigma^2; more of it gives the head less noise and the rest more."""
    head_max_grad_norm: float | None = None
    """With two_budget: the head's own clipping norm. None: as max_grad_norm."""

    def __post_init__(self) -> None:
        DpBudget.__post_init__(self)
        _check_choice("dp_mode", self.dp_mode, get_args(DpMode))
        if not 0 < self.head_budget < 1:
            raise ConfigError(f"head_budget must be > 0 and < 1, got {self.head_budget}")
        if self.head_max_grad_norm is not None and not (
            math.isfinite(self.head_max_grad_norm) and self.head_max_grad_norm > 0
        ):
            raise ConfigError(f"head_max_grad_norm must be a finite number > 0, got {self.head_max_grad_norm}")
        if (self.public_data is not None) != (self.dp_mode == "public_head"):
            raise ConfigError("--dp-mode public_head and --public-data go together: give both, or neither")
        if self.head_weights is not None and self.dp_mode != "frozen_head":
            raise ConfigError("--head-weights is the head of --dp-mode frozen_head: give both, or leave it out")

    @property
    def mode(self) -> DpMode:
        """The one that was chosen."""
        return self.dp_mode

    @property
    def head_apart(self) -> tuple[float, float] | None:
        """Only with two_budget."""
        if self.dp_mode != "two_budget":
            return None
        return self.head_budget, self.head_max_grad_norm or self.max_grad_norm


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"no {name} named {value!r}; known: {', '.join(known)}")


def default_delta(n_train: int) -> float:
    """The largest power of ten below ``1 / n_train``: a delta of 1/n would allow publishing one image outright."""
    if n_train < 1:
        raise ConfigError(f"a private training needs at least one image, got {n_train}")
    return float(f"1e-{len(str(n_train))}")


# Layers whose forward adds in place; Opacus's hooks cannot see through that.
_ADDS_IN_PLACE: Final = {
    ("torchvision.models.resnet", "BasicBlock.forward"),
    ("torchvision.models.resnet", "Bottleneck.forward"),
    ("torchvision.models.mobilenetv3", "InvertedResidual.forward"),
}


def refuse_unsafe(module: nn.Module) -> None:
    """Raise `PrivacyRefusal` if a layer lets one image change another's gradient, or defeats per-example gradients.

    Applies to everything between the image and the loss, heads that are not private included: a BatchNorm in the head
    changes the *other* images' encoder gradients by up to a tenth.
    """
    for name, layer in module.named_modules():
        for complaint in _complaints(layer):
            raise PrivacyRefusal(
                f"DP-SGD cannot go through the {type(layer).__name__} at {name or 'the top'!r}: {complaint}"
            )


def _complaints(layer: nn.Module) -> Iterator[str]:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        yield "it mixes the images of a batch, so clipping no longer bounds what one image does; use GroupNorm"
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
        yield "its running statistics come from the images without noise; use track_running_stats=False"
    if getattr(layer, "inplace", False) is True:
        yield "it works in place, and per-example gradients need its input; use inplace=False"
    forward = type(layer).forward
    if (forward.__module__, forward.__qualname__) in _ADDS_IN_PLACE:
        yield "it adds in place, and per-example gradients need its input; use a subclass with out = out + identity"
    own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
    if own and next(layer.buffers(), None) is not None:
        yield "it keeps buffers beside its weights, which no noise protects; use a layer without them"
    load_opacus()
    from opacus.validators import ModuleValidator

    validator = ModuleValidator.VALIDATORS.get(type(layer))
    if validator is not None:
        for error in validator(layer):
            yield f"in Opacus's words: {error}"


class PrivateStep:
    """The DP-SGD update of a network that is trained through its outputs.

    At most one forward is in flight: a second one before `step` or `discard` raises, because the recorded inputs of two
    batches would be mixed without a sign. Forwards that only look belong under ``torch.no_grad`` on the module itself.
    Parameters that do not require a gradient are never touched. The accountant belongs to the caller, who saves it.
    """

    _KIND: Final = "private_step"
    _VERSION: Final = 1

    def __init__(  # noqa: PLR0913 - the mechanism, and whose it is
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        sample_rate: float,
        noise_generator: torch.Generator | None,
        accountant: Accountant,
        shard: Shard = WHOLE,
        parts: Mapping[str, PartClip] | None = None,
    ) -> None:
        """``expected_batch_size`` is ``sample_rate`` times the number of images; the update is divided by it.

        ``noise_generator`` lives on the module's device; None seeds one from the operating system. With a ``shard``,
        the batch of a step is spread over several processes: all take the step together, with one draw of noise.
        ``parts`` are clipped and noised apart, see `ClippedGradients`; ``noise_multiplier`` stays what is accounted.
        """
        _check_mechanism(noise_multiplier, max_grad_norm, expected_batch_size, sample_rate)
        _check_optimizer(module, optimizer)
        refuse_unsafe(module)
        self.module, self.optimizer, self.accountant, self._shard = module, optimizer, accountant, shard
        self._noise_multiplier, self._sample_rate = noise_multiplier, sample_rate
        self._noise_generator = _noise_generator(module, noise_generator)
        self._engine = engine_for(module)(
            module,
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            generator=self._noise_generator,
            parts=parts,
        )
        self._in_flight: int | None = None

    def forward(self, x: Tensor) -> Any:
        """What the module returns for the batch ``x`` (B first; B may be 0), with its graph kept for `step`."""
        if self._in_flight is not None:
            raise ProtocolError("a forward is still in flight: step() or discard() it before the next one")
        if not all(layer.training for layer in self.module.modules() if _trains(layer)):
            raise ProtocolError("a private step needs the module in training mode: call module.train() first")
        try:
            outputs = self._engine.forward(x)
        except BaseException:
            self._engine.reset()
            raise
        self._in_flight = len(x)
        return outputs

    def step(self, outputs: Sequence[Tensor], cut_gradients: Sequence[Tensor]) -> None:
        """One private step from dL/d(output) of each output, for the mean loss L over the batch of `forward`.

        An empty batch is noised and charged like any other. Raises `ProtocolError` for a gradient of the wrong shape or
        one that is not finite, before anything is charged or changed.
        """
        n_examples = self._in_flight
        if n_examples is None:
            raise ProtocolError("there is no forward in flight to step")
        checked = _checked(outputs, cut_gradients, n_examples)
        try:
            self._engine.accumulate([z for z, _ in checked], [dz for _, dz in checked], n_examples)
        except BaseException:
            self.discard()
            raise
        self._account()
        self._engine.apply(self._shard)
        self.discard()

    def _account(self) -> None:
        """Charge the step that is about to be taken. If this raises, it is not taken."""
        self.accountant.step(noise_multiplier=self._noise_multiplier, sample_rate=self._sample_rate)

    def discard(self) -> None:
        """Forget the forward in flight, if there is one. Nothing is charged."""
        self._engine.reset()
        self._in_flight = None

    def close(self) -> None:
        """Take the hooks off: the module is then as it was before, with new weights."""
        self._engine.close()

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimiser and of the noise.

        Whoever goes on from it must repeat the same batches: noise that is used twice on different gradients cancels in
        their difference.
        """
        return {
            "kind": self._KIND,
            "version": self._VERSION,
            "optimizer": self.optimizer.state_dict(),
            "noise": self._noise_generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. A forward in flight is forgotten."""
        header = (state.get("kind"), state.get("version"))
        if header != (self._KIND, self._VERSION):
            raise CheckpointError(f"this is not the state of a private step: {header}")
        self.discard()
        self.optimizer.load_state_dict(state["optimizer"])
        self._noise_generator.set_state(state["noise"])


def _checked(outputs: Sequence[Tensor], gradients: Sequence[Tensor], n_examples: int) -> list[tuple[Tensor, Tensor]]:
    """Outputs with a graph, each with its gradient in its own precision and place."""
    if not outputs or len(outputs) != len(gradients):
        raise ProtocolError(f"there must be one cut gradient per output, got {len(gradients)} for {len(outputs)}")
    for output, gradient in zip(outputs, gradients, strict=True):
        if output.ndim == 0 or len(output) != n_examples:
            raise ProtocolError(f"an output must have one row per image ({n_examples}), got {tuple(output.shape)}")
        if not isinstance(gradient, Tensor) or not gradient.is_floating_point() or gradient.shape != output.shape:
            got = tuple(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
            raise ProtocolError(f"a cut gradient must be a float tensor of shape {tuple(output.shape)}, got {got}")
        if not torch.isfinite(gradient).all():
            raise ProtocolError("a cut gradient holds NaN or infinity")
    pairs = [(z, dz.detach().to(z)) for z, dz in zip(outputs, gradients, strict=True) if z.requires_grad]
    if n_examples and not pairs:
        raise ProtocolError("no output has a graph: call forward() with gradients enabled, and pass what it returned")
    return pairs


def _trains(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters(recurse=False))


def _check_mechanism(
    noise_multiplier: float, max_grad_norm: float, expected_batch_size: float, sample_rate: float
) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ConfigError(f"the noise multiplier must be a finite number >= 0, got {noise_multiplier}")
    for name, value in (("max_grad_norm", max_grad_norm), ("expected_batch_size", expected_batch_size)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} must be a finite number > 0, got {value}")
    if not 0 < sample_rate <= 1:
        raise ConfigError(
            f"the sample rate must be > 0 and <= 1, got {sample_rate}: it is batch size / number of images"
        )


def _check_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    named = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not named:
        raise ConfigError("a private step needs a module with something to train; all its parameters are frozen")
    if missing := sorted(name for key, name in named.items() if key not in held):
        raise ConfigError(
            f"the optimiser lacks parameters of the module, and one clip must cover all: {', '.join(missing)}"
        )
    if len(held) > len(named):
        raise ConfigError(
            f"the optimiser holds {len(held) - len(named)} parameter(s) that the module does not train; "
            "they would be updated without noise: build it from the module's trainable parameters"
        )


def _noise_generator(module: nn.Module, generator: torch.Generator | None) -> torch.Generator:
    """The generator, on the device of the module's parameters, or a fresh one there."""
    devices = {p.device for p in module.parameters() if p.requires_grad}
    if len(devices) > 1:
        raise ConfigError(f"a private step needs its module on one device, got {', '.join(sorted(map(str, devices)))}")
    device = devices.pop()
    if generator is None:
        # 63 bits of the system's entropy. The stream itself is not a cryptographic one: whoever could see enough raw
        # noise could predict the rest, and what is published is never raw noise.
        return torch.Generator(device).manual_seed(secrets.randbits(63))
    if generator.device.type != device.type:
        raise ConfigError(
            f"the noise generator is on {generator.device}, the module on {device}; make it on the latter"
        )
    return generator
