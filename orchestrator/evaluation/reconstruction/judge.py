"""R3's judge: networks without privacy that were trained on real images, applied to reconstructions (SPEC E.4).

Whatever a judge still recognises, the reconstruction shows, however low its PSNR.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.errors import NonFiniteLossError
from orchestrator.evaluation.attacks.base import LabelArray
from orchestrator.evaluation.reconstruction.base import pixels, require_positive
from orchestrator.network import NetworkConfig, freeze, named_modules, task_of
from orchestrator.optimisation import OptimiserConfig, set_learning_rate
from orchestrator.sampling import ShuffledBatches, derive_seed
from tasks.datasets.table import ImageArray

_CHUNK = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig:
    """How the judge is built and trained: one encoder for all targets, a head each."""

    network: NetworkConfig = NetworkConfig(module="identity")
    epochs: int = 15
    min_steps: int = 300
    batch_size: int = 32
    optimiser: OptimiserConfig = OptimiserConfig()

    def __post_init__(self) -> None:
        require_positive("judge", {name: getattr(self, name) for name in ("epochs", "min_steps", "batch_size")})


class Judge(nn.Module):
    """Pixels in [0, 1] to one set of logits a target; its encoder's output is the space of ``perceptual_proxy``."""

    def __init__(self, encoder: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, named_modules(heads)

    def features(self, x_B3SS: Tensor) -> Tensor:
        """(B, C, H, W)."""
        u: Tensor = self.encoder(2 * x_B3SS - 1)
        return u

    def forward(self, x_B3SS: Tensor) -> dict[str, Tensor]:
        """(B, K) logits per target."""
        u = self.features(x_B3SS)
        return {task_of(name): head(u) for name, head in self.heads.items()}

    @torch.no_grad()
    def correct(self, x_N3SS: Tensor, labels: Mapping[str, LabelArray]) -> dict[str, int]:
        """Per target, how many images it recognises."""
        counts = dict.fromkeys(labels, 0)
        for start in range(0, len(x_N3SS), _CHUNK):
            logits = self(x_N3SS[start : start + _CHUNK])
            for target, y in labels.items():
                answers = logits[target].argmax(dim=1).cpu().numpy()
                counts[target] += int((answers == y[start : start + _CHUNK]).sum())
        return counts


def train_judge(
    images: ImageArray,
    labels: Mapping[str, LabelArray],
    n_classes: Mapping[str, int],
    *,
    config: JudgeConfig,
    seed: int,
) -> Judge:
    """A frozen judge. Raises `NonFiniteLossError` where its training diverges."""
    size = images.shape[1]
    judge = Judge(
        config.network.build_encoder(seed=derive_seed(seed, "judge")),
        config.network.build_heads(n_classes, size, seed=derive_seed(seed, "judge")),
    )
    x = pixels(images)
    y = {target: torch.from_numpy(np.asarray(labels[target], dtype=np.int64)) for target in n_classes}
    batches = ShuffledBatches(len(x), batch_size=config.batch_size, seed=derive_seed(seed, "judge batches"))
    optimiser = config.optimiser.build(list(judge.parameters()))
    total = max(config.min_steps, config.epochs * batches.steps_per_epoch)
    for step in range(total):
        ids = torch.from_numpy(batches.ids(step))
        logits = judge(x[ids])
        loss = torch.stack([functional.cross_entropy(logits[t], y[t][ids]) for t in y]).sum()
        if not torch.isfinite(loss):
            raise NonFiniteLossError("judge", step, loss.item())
        set_learning_rate(optimiser, config.optimiser.learning_rate(step, total))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    freeze(judge)
    return judge
