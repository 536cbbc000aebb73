"""One task's network trained alone, on images, without any privacy: what the features' utility is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.errors import NonFiniteLossError
from orchestrator.optimisation import OptimiserConfig, set_learning_rate
from orchestrator.sampling import ShuffledBatches, derive_seed
from tasks.datasets.table import ImageArray, LabelArray, Normalisation
from tasks.losses import loss_function
from tasks.metrics import compute_metrics
from tasks.spec import TaskSpec
from tasks.transforms import mirror, to_tensor

IdArray = NDArray[np.int64]

Progress = Callable[[int, int, float], None]
"""Called after every epoch with: epochs done, epochs in all, mean loss of the epoch."""

_CHUNK = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class AloneResult:
    """How the network did on the test rows."""

    metrics: Mapping[str, float]
    seconds: float


def train_alone(  # noqa: PLR0913 - one call says everything that the comparison depends on
    images: ImageArray,
    labels: LabelArray,
    *,
    normalisation: Normalisation,
    flip: bool,
    train_ids: IdArray,
    test_ids: IdArray,
    network: nn.Module,
    spec: TaskSpec,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    weight_decay: float = OptimiserConfig().weight_decay,
    schedule: Literal["cosine", "constant"] = OptimiserConfig().schedule,
    progress: Progress | None = None,
) -> AloneResult:
    """Train ``network`` in place, images to logits, and measure it; it stays on the device where it is.

    ``images`` (N, S, S, 3) and ``labels`` (N,) are the whole table; the ids are row numbers. With ``flip``, every
    image is mirrored or not afresh each time it is drawn. The optimiser and its schedule are those of a session.
    A network with dropout draws from PyTorch's own generator and is not determined by ``seed``.
    Raises `NonFiniteLossError`, which names the step.
    """
    started = time.perf_counter()
    config = OptimiserConfig(lr=learning_rate, weight_decay=weight_decay, schedule=schedule)
    optimiser = config.build([p for p in network.parameters() if p.requires_grad])
    batches = ShuffledBatches(len(train_ids), batch_size=batch_size, seed=derive_seed(seed, "alone", spec.name))
    mirrored = np.random.default_rng(derive_seed(seed, "alone flips", spec.name))
    device, loss_of = _device(network), loss_function(spec.loss)
    total = epochs * batches.steps_per_epoch
    losses: list[float] = []
    network.train()
    for step in range(total):
        ids = train_ids[batches.ids(step)]
        x = to_tensor(images[ids], normalisation)
        if flip:
            x = _mirrored_where(x, torch.from_numpy(mirrored.random(len(ids)) < 0.5))
        loss = loss_of(network(x.to(device)), torch.from_numpy(labels[ids]).to(device)).mean()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise NonFiniteLossError(spec.name, step, losses[-1])
        set_learning_rate(optimiser, config.learning_rate(step, total))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if progress is not None and (step + 1) % batches.steps_per_epoch == 0:
            progress((step + 1) // batches.steps_per_epoch, epochs, float(np.mean(losses[-batches.steps_per_epoch :])))
    logits = _logits(network, images, test_ids, normalisation)
    return AloneResult(metrics=compute_metrics(spec, logits, labels[test_ids]), seconds=time.perf_counter() - started)


def _mirrored_where(x_BCHW: Tensor, chosen_B: Tensor) -> Tensor:
    return torch.where(chosen_B.view(-1, 1, 1, 1), mirror(x_BCHW), x_BCHW)


@torch.no_grad()
def _logits(network: nn.Module, images: ImageArray, ids: IdArray, normalisation: Normalisation) -> NDArray[np.float32]:
    """(N, n_outputs), in evaluation mode."""
    network.eval()
    device = _device(network)
    chunks = [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]
    parts = [network(to_tensor(images[chunk], normalisation).to(device)).float().cpu() for chunk in chunks]
    return np.asarray(torch.cat(parts).numpy())


def _device(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))
