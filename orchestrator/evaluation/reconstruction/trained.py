"""R1: a decoder trained on the attacker's own features and images (SPEC E.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from orchestrator.evaluation.attacks.base import FloatArray
from orchestrator.evaluation.attacks.maps import Standardiser, as_maps
from orchestrator.evaluation.reconstruction.base import ReconstructionInput, pixels, require_positive
from orchestrator.evaluation.reconstruction.decoders import DECODERS, build_decoder, decode
from orchestrator.evaluation.reconstruction.metrics import differentiable_ssim
from orchestrator.optimisation import OptimiserConfig
from orchestrator.sampling import ShuffledBatches, derive_seed
from tasks.registry import look_up

Loss = Callable[[Tensor, Tensor], Tensor]

_SSIM_WEIGHT = 0.05


def _mse(x: Tensor, target: Tensor) -> Tensor:
    return (x - target).square().mean()


def _mse_ssim(x: Tensor, target: Tensor) -> Tensor:
    return _mse(x, target) + _SSIM_WEIGHT * (1 - differentiable_ssim(x, target).mean())


def _l1(x: Tensor, target: Tensor) -> Tensor:
    return (x - target).abs().mean()


LOSSES: Mapping[str, Loss] = {"mse": _mse, "mse_ssim": _mse_ssim, "l1": _l1}
"""mse_ssim is MSE + 0.05 (1 - SSIM)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedDecoder:
    """A decoder after its training: features in, images out."""

    network: nn.Module = field(repr=False)
    standardiser: Standardiser | None = field(repr=False)
    device: str

    def __call__(self, z: FloatArray) -> Tensor:
        """(N, 3, S, S) pixels in [0, 1] of (N, C, H, W), or of (N, D) for features that are vectors."""
        maps = as_maps(z)
        if self.standardiser is not None:
            maps = self.standardiser(maps)
        return decode(self.network, maps.to(self.device))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedDecoder:
    """A decoder of one kind, trained on standardised channels with AdamW under a one-cycle schedule.

    What answers is a running average of the weights, at the check with the least loss on the validation rows; the
    state before the first step, for the residual kinds the mean image, is one of the checks.
    """

    name: str = "decoder"
    kind: str = "pixel_shuffle"
    """Of `DECODERS`: transposed (the paper's), pixel_shuffle or staged."""
    loss: str = "mse_ssim"
    """Of `LOSSES`: mse, mse_ssim or l1."""
    standardise: bool = True
    """False: features as they are, as in the paper."""
    width: int = 128
    epochs: int = 20
    min_steps: int = 600
    """At least so many steps, however few rows there are."""
    batch_size: int = 32
    learning_rate: float = 2e-3
    """At its highest."""
    weight_decay: float = 1e-2
    averaging: float = 0.98
    """Of the weights, per step."""
    checks: int = 20
    """How often the validation rows are looked at."""

    def __post_init__(self) -> None:
        look_up(DECODERS, "decoder", self.kind)
        look_up(LOSSES, "loss of a decoder", self.loss)
        names = ("width", "epochs", "min_steps", "batch_size", "learning_rate", "checks")
        require_positive(self.name, {name: getattr(self, name) for name in names})

    def run(self, data: ReconstructionInput) -> Tensor:
        """(N, 3, S, S) for all test rows."""
        return self.fit(data)(data.test_z)

    def fit(self, data: ReconstructionInput) -> FittedDecoder:
        """Learn from the training rows, and choose by the validation rows; no test row is looked at."""
        train_z, validation_z = as_maps(data.train_z), as_maps(data.validation_z)
        standardiser = Standardiser.of(train_z) if self.standardise else None
        if standardiser is not None:
            train_z, validation_z = standardiser(train_z), standardiser(validation_z)
        train_z, validation_z = train_z.to(data.device), validation_z.to(data.device)
        train_x = pixels(data.train_x).to(data.device)
        decoder = build_decoder(
            self.kind,
            (train_z.shape[1], train_z.shape[2], train_z.shape[3]),
            mean_image=train_x.mean(dim=0).cpu(),
            width=self.width,
            seed=derive_seed(data.seed, "decoder", self.name),
        ).to(data.device)
        decoder.load_state_dict(
            self._train(decoder, data.seed, (train_z, train_x), (validation_z, pixels(data.validation_x)))
        )
        return FittedDecoder(network=decoder, standardiser=standardiser, device=data.device)

    def _train(
        self, decoder: nn.Module, seed: int, train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """The weights of the best check."""
        (train_z, train_x), loss_of = train, LOSSES[self.loss]
        batches = ShuffledBatches(len(train_z), batch_size=self.batch_size, seed=derive_seed(seed, "decoder batches"))
        total = max(self.min_steps, self.epochs * batches.steps_per_epoch)
        interval = math.ceil(total / self.checks)
        optimiser = OptimiserConfig(lr=self.learning_rate, weight_decay=self.weight_decay).build(
            list(decoder.parameters())
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, self.learning_rate, total_steps=total, pct_start=0.2)
        average = AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(self.averaging))
        best_loss, best = self._validate(decoder, validation), _copy(decoder)
        for step in range(total):
            ids = torch.from_numpy(batches.ids(step)).to(train_z.device)
            loss = loss_of(decoder(train_z[ids]), train_x[ids])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            average.update_parameters(decoder)
            if (step + 1) % interval and step + 1 < total:
                continue
            checked = self._validate(average.module, validation)
            if checked < best_loss:
                best_loss, best = checked, _copy(average.module)
        return best

    def _validate(self, decoder: nn.Module, validation: tuple[Tensor, Tensor]) -> float:
        z, x = validation
        loss = LOSSES[self.loss](decode(decoder, z), x).item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"{self.name} diverged: its validation loss is {loss}")
        return loss


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
