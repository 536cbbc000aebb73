"""Phase 1: train the private encoder E (MetaMorphosis, Algorithm 2, lines 2-4 and 9).

Which part of the network is clipped and noised depends on the mode (docs/architecture.md, "What DP covers"):

    surrogate_then_freeze   E and a small surrogate head, jointly; the surrogate is thrown away, E is released
    whole                   E, g and M, jointly
    encoder_only_paper      E and g; M is trained beside them without noise, and nothing is guaranteed
    no plan                 nothing
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.errors import ConfigError, NonFiniteLossError
from orchestrator.inputs import ImageInputs
from orchestrator.network import FeatureNetwork, LogitNetwork, NetworkConfig, cpu_state, trainable
from orchestrator.optimisation import OptimiserConfig, PlainUpdate, Update, restore, set_learning_rate, snapshot
from orchestrator.privacy.accounting import Accountant
from orchestrator.privacy.dp import DpConfig
from orchestrator.privacy.plan import DpPlan
from orchestrator.sampling import BatchSampler, PoissonBatches, ShuffledBatches, derive_seed
from orchestrator.shard import WHOLE, Shard
from tasks.losses import loss_function
from tasks.metrics import compute_metrics
from tasks.spec import TaskSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderTrainingConfig:
    """How phase 1 trains."""

    epochs: int = 10
    """Passes over the training images. Each costs privacy; the noise is set so that all of them cost epsilon."""
    batch_size: int = 64
    """Examples per step; with DP, the expected number."""
    lr: float = 1e-3
    """Learning rate of AdamW, at its highest."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(f"encoder epochs and batch size must be at least 1, got {self.epochs}, {self.batch_size}")

    @property
    def optimiser(self) -> OptimiserConfig:
        """AdamW with a constant rate: a falling one would waste the noise that the last steps were charged for."""
        return OptimiserConfig(lr=self.lr, weight_decay=self.weight_decay, schedule="constant")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderEpoch:
    """What one epoch of phase 1 did."""

    epoch: int
    """Counted from 1."""
    losses: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, float]]
    """Task to metrics on the validation subset."""
    epsilon_spent: float


@dataclass(frozen=True, kw_only=True)
class EncoderResult:
    """What phase 1 leaves behind."""

    encoder: Mapping[str, Tensor] = field(repr=False)
    modules: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    """Trained g_i; empty where the surrogate stood in for module and head."""
    heads: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    test_metrics: Mapping[str, Mapping[str, float]]
    """Task to metrics on the test subset, of E, g and M together (or E and the surrogate)."""
    accountant: Mapping[str, Any] | None
    """State of the accountant: every private step that was taken. None without DP."""
    steps: int


class EncoderTraining:
    """One phase-1 training, in this process. `orchestrator.train_job` runs it on a cluster."""

    def __init__(  # noqa: PLR0913 - everything comes in by name, from one place: `orchestrator.train_job`
        self,
        *,
        config: EncoderTrainingConfig,
        plan: DpPlan | None,
        surrogate_head: str = "linear",
        network: NetworkConfig,
        image_size: int,
        specs: Mapping[str, TaskSpec],
        inputs: ImageInputs,
        labels: Mapping[str, Mapping[str, NDArray[np.int64]]],
        seed: int,
        device: torch.device | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        self.config, self.specs, self.inputs, self.labels = config, dict(specs), inputs, labels
        self.shard = shard
        self.plan, self.mode = plan, plan.mode if plan else "none"
        self.sampler = batch_sampler(plan, n=inputs.size("train"), batch_size=config.batch_size, seed=seed)
        outputs = {task: spec.n_outputs for task, spec in self.specs.items()}
        self.encoder = network.build_encoder(seed=seed)
        surrogate = self.mode == "surrogate_then_freeze"
        modules = {} if surrogate else network.build_modules(outputs, image_size, seed=seed)
        kind = surrogate_head if surrogate else None
        self.modules, self.heads = modules, network.build_heads(outputs, image_size, seed=seed, kind=kind)
        if surrogate:
            modules = {task: nn.Identity() for task in outputs}
        features = FeatureNetwork(self.encoder, modules)
        self.logits = LogitNetwork(features, self.heads)
        if device is not None:
            self.logits.to(device)
        self._device = device or torch.device("cpu")
        self._open_heads = self.mode == "encoder_only_paper"
        self._network: nn.Module = features if self._open_heads else self.logits
        optimiser = config.optimiser
        self._head_optimizer = optimiser.build(trainable(self.logits.heads)) if self._open_heads else None
        self.accountant = self.plan.accountant() if self.plan else None
        self._update: Update = build_update(
            self._network,
            optimiser,
            plan=self.plan,
            accountant=self.accountant,
            head_path=self.logits.heads,
            shard=shard,
        )
        self._losses = {task: loss_function(spec.loss) for task, spec in self.specs.items()}
        self.step = 0
        self._seen: list[dict[str, float]] = []

    @property
    def total_steps(self) -> int:
        """Of the whole training."""
        return self.sampler.steps_per_epoch * self.config.epochs

    @property
    def epsilon_spent(self) -> float:
        """What has been accounted so far; 0.0 without DP."""
        return self.accountant.epsilon(self.plan.delta) if self.accountant and self.plan else 0.0

    def run_epoch(self) -> EncoderEpoch:
        """The steps to the end of the epoch, then the validation metrics."""
        while True:
            self.train_step()
            if (epoch := self.ended_epoch()) is not None:
                return epoch

    def ended_epoch(self) -> EncoderEpoch | None:
        """What the epoch did that ended with the last step; None within one. Metrics are the first shard's to take."""
        number, rest = divmod(self.step, self.sampler.steps_per_epoch)
        if rest:
            return None
        seen, self._seen = self._seen, []
        return EncoderEpoch(
            epoch=number,
            losses={t: sum(s[t] for s in seen) / max(1, len(seen)) for t in self.specs},
            metrics=self.evaluate("validation") if self.shard.first else {},
            epsilon_spent=self.epsilon_spent,
        )

    def train_step(self) -> dict[str, float]:
        """One step; the losses by task, or nothing for an empty Poisson batch, which is noised and charged as well.

        A shard works on its part of the batch, and all of them take the same step.
        """
        ids = self.sampler.ids(self.step)
        part = self.shard.part
        set_learning_rate(self._update.optimizer, self.config.optimiser.learning_rate(self.step, self.total_steps))
        self._network.train()
        outputs = self._update.forward(self.inputs.training(self.step, ids, part))
        cut, losses = self._cut_gradients(outputs, ids[part], of=len(ids))
        self._update.step(list(outputs.values()), [cut[task] for task in outputs])
        self.step += 1
        if len(ids):
            losses = self.shard.sum_numbers({task: losses.get(task, 0.0) * len(ids[part]) / len(ids) for task in cut})
            self._seen.append(losses)
        return losses

    def evaluate(self, subset: str) -> dict[str, dict[str, float]]:
        """The metrics of every task on one subset."""
        self.logits.eval()
        collected: dict[str, list[NDArray[np.float32]]] = {task: [] for task in self.specs}
        n = self.inputs.size(subset)
        for start in range(0, n, 256):
            with torch.no_grad():
                outputs = self.logits(self.inputs.subset(subset, start, min(n, start + 256)))
            for task, logits in outputs.items():
                collected[task].append(logits.float().cpu().numpy())
        return {
            task: compute_metrics(spec, np.concatenate(collected[task]), self.labels[task][subset])
            for task, spec in self.specs.items()
        }

    def result(self) -> EncoderResult:
        """Weights as they are now. The surrogate's are left out: nothing is to be built on it."""
        surrogate = self.mode == "surrogate_then_freeze"
        return EncoderResult(
            encoder=cpu_state(self.encoder),
            modules={task: cpu_state(module) for task, module in self.modules.items()},
            heads={} if surrogate else {task: cpu_state(head) for task, head in self.heads.items()},
            test_metrics=self.evaluate("test"),
            accountant=self.accountant.state_dict() if self.accountant else None,
            steps=self.step,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here."""
        return {
            "network": cpu_state(self.logits),
            "update": self._update.state_dict(),
            "heads": snapshot(self._head_optimizer) if self._head_optimizer else None,
            "accountant": self.accountant.state_dict() if self.accountant else None,
            "step": self.step,
            "seen": list(self._seen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.logits.load_state_dict(state["network"])
        self._update.load_state_dict(state["update"])
        if self._head_optimizer is not None:
            restore(self._head_optimizer, state["heads"])
        if self.accountant is not None:
            self.accountant.load_state_dict(state["accountant"])
        self.step, self._seen = int(state["step"]), list(state["seen"])

    def _cut_gradients(
        self, outputs: Mapping[str, Tensor], ids: NDArray[np.int64], *, of: int
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """d(mean loss)/d(output), where the output is the logits, or the feature if the head is trained in the open.

        Of a shard's ``ids`` out of a batch ``of`` so many, the mean is over the shard's own for a private update, which
        takes examples one by one, and over the whole batch's for a plain one, whose gradients are added up.
        """
        if len(ids) == 0:
            if self._head_optimizer is not None and of:
                self._step_heads(share=0.0)
            return {task: torch.zeros_like(z) for task, z in outputs.items()}, {}
        leaves = {task: z.detach().requires_grad_() for task, z in outputs.items()}
        losses = {}
        for task, leaf in leaves.items():
            logits = self.heads[task](leaf) if self._open_heads else leaf
            targets = torch.from_numpy(self.labels[task]["train"][ids]).to(self._device)
            losses[task] = self._losses[task](logits, targets).mean()
            if not torch.isfinite(losses[task]):
                raise NonFiniteLossError(task, self.step, float(losses[task]))
        if self._head_optimizer is not None:
            self._head_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        share = len(ids) / of
        if self._head_optimizer is not None:
            self._step_heads(share=share)
        weight = share if self.plan is None else 1.0
        cut = {
            task: leaf.grad * weight if leaf.grad is not None else torch.zeros_like(leaf)
            for task, leaf in leaves.items()
        }
        return cut, {task: float(loss.detach()) for task, loss in losses.items()}

    def _step_heads(self, *, share: float) -> None:
        """Update the open heads on the mean over the whole batch, of which this shard has ``share``."""
        assert self._head_optimizer is not None
        heads = trainable(self.logits.heads)
        for parameter in heads:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad * share
        self.shard.sum([p.grad for p in heads if p.grad is not None])
        self._head_optimizer.step()


def batch_sampler(plan: DpPlan | None, *, n: int, batch_size: int, seed: int) -> BatchSampler:
    """Poisson with DP, shuffled without. The private one's batches are as secret as its noise."""
    if plan is None:
        return ShuffledBatches(n, batch_size=batch_size, seed=derive_seed(seed, "batches"))
    return PoissonBatches(n, batch_size=min(batch_size, n), seed=plan.sampling_seed)


def make_plan(dp: DpConfig, *, n_train: int, batch_size: int, epochs: int, secret: int | None = None) -> DpPlan | None:
    """The mechanism of a training of so many epochs; None without an epsilon. For ``secret`` see `DpPlan.make`."""
    if dp.epsilon is None:
        return None
    sampler = PoissonBatches(n_train, batch_size=min(batch_size, n_train), seed=0)
    steps = sampler.steps_per_epoch * epochs
    return DpPlan.make(dp, n_train=n_train, sample_rate=sampler.sample_rate, steps=steps, secret=secret)


def build_update(
    network: nn.Module,
    optimiser: OptimiserConfig,
    *,
    plan: DpPlan | None,
    accountant: Accountant | None,
    head_path: nn.Module | None = None,
    shard: Shard = WHOLE,
) -> Update:
    """Plain, or per-example clipped and noised where there is a plan. ``head_path`` is checked, not changed."""
    parameters = optimiser.build(trainable(network)) if trainable(network) else _NoParameters()
    if plan is None:
        return PlainUpdate(network, parameters, shard=shard)
    assert accountant is not None
    return plan.private_step(network, parameters, accountant=accountant, head_path=head_path, shard=shard)


class _NoParameters(torch.optim.Optimizer):
    """Stands where nothing is trained (identity modules on a frozen encoder)."""

    def __init__(self) -> None:
        super().__init__([nn.Parameter(torch.zeros(1), requires_grad=False)], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change nothing."""
