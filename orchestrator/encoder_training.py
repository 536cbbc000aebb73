"""Phase 1: train the private encoder E (MetaMorphosis, Algorithm 2, lines 2-4 and 9).

Which part of the network is clipped and noised depends on the mode (docs/architecture.md, "What DP covers"):

    surrogate_then_freeze   E and a small surrogate head, jointly; the surrogate is thrown away, E is released
    surrogate_dp_modules    the same here; `orchestrator.module_training` goes on with the modules
    whole                   E, g and M, jointly
    two_budget              E, g and M; M is clipped and noised apart from the rest
    public_head             E and g; M is trained beside them on public images alone
    frozen_head             E and g; M stays as it was at the start
    encoder_only_paper      E and g; M is trained beside them without noise, and nothing is guaranteed
    no plan                 nothing
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.errors import ConfigError, NonFiniteLossError
from orchestrator.inputs import EVERY
from orchestrator.network import FeatureNetwork, LogitNetwork, Networks, cpu_state, freeze, trainable
from orchestrator.optimisation import OptimiserConfig, Update, restore, set_learning_rate, snapshot
from orchestrator.privacy.accounting import Accountant
from orchestrator.privacy.coupling import refuse_coupled
from orchestrator.privacy.plan import DpPlan
from orchestrator.sampling import ShuffledBatches, derive_seed
from orchestrator.shard import WHOLE, Shard
from orchestrator.updates import batch_sampler, build_update
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


SURROGATE: Final = frozenset({"surrogate_then_freeze", "surrogate_dp_modules"})
"""Modes in which a stand-in takes the place of module and head, and is thrown away."""
CUT_BEFORE_HEAD: Final = frozenset({"encoder_only_paper", "public_head", "frozen_head"})
"""Modes in which the heads are outside what is clipped and noised."""


class TrainingInputs(Protocol):
    """What phase 1 is fed with; see `orchestrator.inputs`."""

    def size(self, subset: str) -> int:
        """How many examples the subset has."""
        ...

    def training(self, step: int, ids: NDArray[np.int64], part: slice = EVERY) -> Tensor:
        """One training batch, or a part of it."""
        ...

    def subset(self, subset: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a subset, as they are."""
        ...


@dataclass(frozen=True, kw_only=True)
class PublicExamples:
    """What the heads of public_head learn from: nobody has to protect it."""

    inputs: TrainingInputs
    """Its training subset is all of it."""
    labels: Mapping[str, NDArray[np.int64]]
    """Task to labels."""


class EncoderTraining:
    """One phase-1 training, in this process. `orchestrator.train_job` runs it on a cluster."""

    def __init__(  # noqa: PLR0913 - everything comes in by name, from one place: `orchestrator.train_job`
        self,
        *,
        config: EncoderTrainingConfig,
        plan: DpPlan | None,
        surrogate_head: str = "linear",
        network: Networks,
        image_size: int,
        specs: Mapping[str, TaskSpec],
        inputs: TrainingInputs,
        labels: Mapping[str, Mapping[str, NDArray[np.int64]]],
        seed: int,
        device: torch.device | None = None,
        shard: Shard = WHOLE,
        public: PublicExamples | None = None,
        head_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """``public`` and ``head_weights`` are for the modes public_head and frozen_head."""
        self.config, self.specs, self.inputs, self.labels = config, dict(specs), inputs, labels
        self.shard, self._public = shard, public
        self.plan, self.mode = plan, plan.mode if plan else "none"
        self.sampler = batch_sampler(plan, n=inputs.size("train"), batch_size=config.batch_size, seed=seed)
        self._losses = {task: loss_function(spec.loss) for task, spec in self.specs.items()}
        self._device = device or torch.device("cpu")
        if dense := [task for task, spec in self.specs.items() if spec.dense]:
            raise ConfigError(
                f"{', '.join(dense)} answers with a map, and what is trained in phase 1 or under DP answers with a "
                "class: train it behind a published encoder (--phase tasks, or add_task without --epsilon), or with "
                "--algorithm task"
            )
        self.logits = self._build(network, image_size, seed=seed, surrogate=surrogate_head).to(self._device)
        self._load_heads(head_weights)
        self._heads_apart = self.mode in CUT_BEFORE_HEAD
        self._network: nn.Module = self.logits.features if self._heads_apart else self.logits
        optimiser = config.optimiser
        learns = self._heads_apart and self.mode != "frozen_head"
        self._head_optimizer = optimiser.build(trainable(self.logits.heads)) if learns else None
        self._public_sampler = self._sample_public(seed)
        self.accountant = self.plan.accountant() if self.plan else None
        if self.plan is not None:
            self._refuse_coupled()
        self._update: Update = build_update(
            self._network,
            optimiser,
            plan=self.plan,
            accountant=self.accountant,
            sampler=self.sampler,
            head_path=self.logits.heads,
            shard=shard,
        )
        self.step = 0
        self._seen: list[dict[str, float]] = []

    def _build(self, network: Networks, image_size: int, *, seed: int, surrogate: str) -> LogitNetwork:
        outputs = {task: spec.n_outputs for task, spec in self.specs.items()}
        self.encoder: nn.Module = network.build_encoder(seed=seed)
        self.modules = {} if self._surrogate else network.build_modules(outputs, image_size, seed=seed)
        kind = surrogate if self._surrogate else None
        self.heads = network.build_heads(outputs, image_size, seed=seed, kind=kind)
        branches = {task: nn.Identity() for task in outputs} if self._surrogate else self.modules
        return LogitNetwork(FeatureNetwork(self.encoder, branches), self.heads)

    @property
    def _surrogate(self) -> bool:
        return self.mode in SURROGATE

    def _load_heads(self, weights: Mapping[str, Tensor] | None) -> None:
        if self.mode != "frozen_head":
            return
        for task, head in self.heads.items():
            if weights is not None:
                try:
                    head.load_state_dict(dict(weights))
                except RuntimeError as error:
                    raise ConfigError(f"--head-weights is no head for {task!r}: {error}") from error
            freeze(head)

    def _sample_public(self, seed: int) -> ShuffledBatches | None:
        if self.mode != "public_head":
            return None
        if self._public is None:
            raise ConfigError("the mode public_head needs public examples")
        n = self._public.inputs.size("train")
        return ShuffledBatches(n, batch_size=self.config.batch_size, seed=derive_seed(seed, "public"))

    def _refuse_coupled(self) -> None:
        """A loss that looks at more than one image at a time cannot be made private by clipping image by image."""
        for task, spec in self.specs.items():
            n, loss = spec.n_outputs, self._losses[task]
            refuse_coupled(
                f"the loss {spec.loss!r} of {task!r}",
                lambda logits, n=n, loss=loss: loss(logits, torch.arange(len(logits)) % n).mean(),  # type: ignore[misc]
                (n,),
            )

    @property
    def total_steps(self) -> int:
        """Of the whole training."""
        return self.sampler.steps_per_epoch * self.config.epochs

    @property
    def epsilon_spent(self) -> float:
        """What has been accounted so far, with what this training builds on; 0.0 without DP."""
        if self.accountant is None or self.plan is None:
            return 0.0
        together = Accountant.of(self.accountant.kind, self.plan.before, self.accountant.history)
        return together.epsilon(self.plan.delta)

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
        self._learn_from_public()
        set_learning_rate(self._update.optimizer, self.config.optimiser.learning_rate(self.step, self.total_steps))
        self._network.train()
        outputs = self._forward(self.inputs.training(self.step, ids, part))
        cut, losses = self._cut_gradients(outputs, ids[part], of=len(ids))
        self._update.step(list(outputs.values()), [cut[task] for task in outputs])
        self.step += 1
        if len(ids):
            losses = self.shard.sum_numbers(
                {task: losses.get(task, 0.0) * len(ids[part]) / len(ids) for task in self.specs}
            )
            self._seen.append(losses)
        return losses

    def _forward(self, x: Tensor) -> Mapping[str, Tensor]:
        return self._update.forward(x)

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
        return EncoderResult(
            encoder=cpu_state(self.encoder),
            modules={task: cpu_state(module) for task, module in self.modules.items()},
            heads={} if self._surrogate else {task: cpu_state(head) for task, head in self.heads.items()},
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
            if self._learns_openly and of:
                self._step_heads(share=0.0)
            return {task: torch.zeros_like(z) for task, z in outputs.items()}, {}
        leaves = {task: z.detach().requires_grad_() for task, z in outputs.items()}
        losses = {}
        for task, leaf in leaves.items():
            logits = self.heads[task](leaf) if self._heads_apart else leaf
            targets = torch.from_numpy(self.labels[task]["train"][ids]).to(self._device)
            losses[task] = self._losses[task](logits, targets).mean()
            if not torch.isfinite(losses[task]):
                raise NonFiniteLossError(task, self.step, float(losses[task]))
        if self._head_optimizer is not None:
            self._head_optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        share = len(ids) / of
        if self._learns_openly:
            self._step_heads(share=share)
        weight = share if self.plan is None else 1.0
        cut = {
            task: leaf.grad * weight if leaf.grad is not None else torch.zeros_like(leaf)
            for task, leaf in leaves.items()
        }
        return cut, {task: float(loss.detach()) for task, loss in losses.items()}

    @property
    def _learns_openly(self) -> bool:
        """Whether the heads learn from the private images, without noise: the paper's way."""
        return self._head_optimizer is not None and self._public is None

    def _learn_from_public(self) -> None:
        """One step of the heads of public_head, on public images seen through E and g as they are."""
        if self._public is None or self._public_sampler is None:
            return
        ids = self._public_sampler.ids(self.step)
        with torch.no_grad():
            features = self.logits.features(self._public.inputs.training(self.step, ids))
        for task, z in features.items():
            targets = torch.from_numpy(self._public.labels[task][ids]).to(self._device)
            loss = self._losses[task](self.heads[task](z), targets).mean()
            gradients = torch.autograd.grad(loss, trainable(self.heads[task]))
            for parameter, gradient in zip(trainable(self.heads[task]), gradients, strict=True):
                parameter.grad = gradient
        assert self._head_optimizer is not None
        self._head_optimizer.step()

    def _step_heads(self, *, share: float) -> None:
        """Update the open heads on the mean over the whole batch, of which this shard has ``share``."""
        assert self._head_optimizer is not None
        heads = trainable(self.logits.heads)
        for parameter in heads:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad * share
        self.shard.sum([p.grad for p in heads if p.grad is not None])
        self._head_optimizer.step()
