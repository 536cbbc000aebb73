"""The producer: it owns the images and hands out features.

Axes: B examples, C channels, H and W of a feature map. u = E(x) is the encoder's output, z_i = g_i(u) task i's feature;
where features are bounded g_i(u) is s_i, and z_i is what `orchestrator.release` makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.errors import ConfigError, NonFiniteLossError, ProtocolError, QuarantineError, UnknownNameError
from orchestrator.guard import GradientGuard, check_gradient
from orchestrator.network import cpu_state, named_module
from orchestrator.optimisation import OptimiserConfig, Update, set_learning_rate
from orchestrator.ports import StepReport
from orchestrator.privacy.accounting import Accountant
from orchestrator.privacy.dissimilarity import Dissimilarity, dissimilarity_pull
from orchestrator.privacy.escrow import seal_labels
from orchestrator.release import SessionRelease
from orchestrator.sampling import BatchSampler
from orchestrator.shaping import Shaping
from orchestrator.wire import FeatureBatch, FeatureContract, FeatureGradient, PublicKey, SealedLabels, TaskOffer


class InputSource(Protocol):
    """What the trainable network is fed with: images, or cached outputs of a frozen encoder."""

    def training(self, step: int, ids: NDArray[np.int64]) -> Tensor:
        """The inputs of one training batch, mirrored at random where the data set allows it."""
        ...

    def subset(self, subset: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a subset, never mirrored."""
        ...

    def size(self, subset: str) -> int:
        """How many examples the subset has."""
        ...


class Producer:
    """One training session's producer: the network, the update rule, and what every task is owed.

    Life of a step: ``features(t)`` runs the network and keeps its graph; ``learn(t, gradients)`` consumes it. A
    repeated ``features(t)`` returns the same batch, a repeated ``learn(t)`` the same report; neither is applied twice.
    The state between steps is `state_dict`; everything else follows from the step number.
    """

    def __init__(  # noqa: PLR0913 - everything comes in by name, from one place: `orchestrator.assembly`
        self,
        *,
        offers: Mapping[str, TaskOffer],
        source: InputSource,
        update: Update,
        network: nn.Module,
        fixed_network: nn.Module | None,
        sampler: BatchSampler,
        total_steps: int,
        optimiser: OptimiserConfig,
        dissimilarity: Dissimilarity,
        labels: Mapping[str, Mapping[str, NDArray[np.int64]]],
        accountant: Accountant | None = None,
        delta: float = 0.0,
        guard: GradientGuard | None = None,
        release: SessionRelease | None = None,
        shaping: Shaping | None = None,
    ) -> None:
        """``release`` makes bounded features of what the modules give; None hands out maps as they are.

        ``shaping`` is what is asked of these besides what the tenants ask; None: nothing.
        """
        self._offers = dict(offers)
        self._source, self._sampler = source, sampler
        self._update, self._network, self._fixed = update, network, fixed_network
        self._total_steps, self._optimiser = total_steps, optimiser
        self._dissimilarity = dissimilarity
        self._labels = labels
        self._accountant, self._delta = accountant, delta
        self._guard, self._release, self._shaping = guard, release, shaping
        self._last: StepReport | None = None
        self._pending: _Forward | None = None

    # -- what tenants are told -------------------------------------------------------------------------------------

    def offers(self) -> Mapping[str, TaskOffer]:
        """What each task being trained looks like to its tenant."""
        return self._offers

    def seal_labels(self, key: PublicKey, subset: str) -> SealedLabels:
        """The labels of ``key.task`` for one subset, sealed to its tenant. No other task's labels can be asked for."""
        offer = self._offer(key.task)
        return seal_labels(
            self._labels[key.task][subset],
            task=key.task,
            subset=subset,
            key=key,
            n_classes=offer.spec.n_labels,
            shape=offer.spec.label_shape,
        )

    # -- the protocol ----------------------------------------------------------------------------------------------

    def features(self, step: int) -> dict[str, FeatureBatch]:
        """Every task's feature of this step's batch; a task in quarantine has none."""
        self._expect(step)
        if self._pending is None or self._pending.step != step:
            self._pending = self._forward(step)
        return {task: self._batch(task, self._pending, z) for task, z in self._pending.outputs.items()}

    def learn(self, step: int, gradients: Mapping[str, FeatureGradient]) -> StepReport:
        """Add omega * dS/dz to the tenants' gradients and update, once. Raises before any weight has changed.

        What the guard does not accept counts as if its task had not been in the session in this step, nor will be.
        """
        if self._last is not None and self._last.step == step:
            return self._last
        self._expect(step)
        if self._pending is None:
            self._pending = self._forward(step)
        cut = self._cut_gradients(self._pending, gradients)
        forward = self._pending.without(self._quarantined)
        similarity, by_pair = self._add_dissimilarity(forward, cut)
        if self._shaping is not None:
            for task, gradient in self._shaping.pull(forward.outputs, forward.ids, step=step).items():
                cut[task] += gradient
        set_learning_rate(self._update.optimizer, self._optimiser.learning_rate(step, self._total_steps))
        tasks = list(forward.outputs)
        with self._held():
            self._update.step([forward.outputs[t] for t in tasks], [cut[t] for t in tasks])
        self._pending = None
        self._last = StepReport(
            step=step,
            losses={task: gradients[task].loss for task in tasks},
            dissimilarity=similarity,
            epsilon_spent=self._accountant.epsilon_upper(self._delta) if self._accountant else 0.0,
            dissimilarity_by_pair=by_pair,
            quarantined=dict(self._quarantined),
        )
        return self._last

    def evaluation_features(self, subset: str, *, batch_size: int = 256) -> dict[str, FeatureBatch]:
        """Every task's feature of a whole subset, in row order, without touching the step in flight.

        A task in quarantine has none.
        """
        n = self._source.size(subset)
        parts: dict[str, list[NDArray[np.float32]]] = {t: [] for t in self._offers if t not in self._quarantined}
        for start in range(0, n, batch_size):
            with torch.no_grad():
                outputs = self._evaluate(self._source.subset(subset, start, min(n, start + batch_size)))
            for task, chunks in parts.items():
                chunks.append(_to_numpy(self._shown(task, outputs[task], subset=subset, start=start)))
        ids = np.arange(n, dtype=np.int64)
        return {
            task: FeatureBatch(
                contract=self._offers[task].contract,
                step=-1,
                subset=subset,
                example_ids=ids,
                features=np.concatenate(chunks) if chunks else np.zeros((0, *self._offers[task].contract.shape), "f4"),
            )
            for task, chunks in parts.items()
        }

    # -- state -----------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The network's weights, for publication: a copy."""
        return cpu_state(self._network)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, accountant, guard, and the last step that was applied."""
        return {
            "network": cpu_state(self._network),
            "update": self._update.state_dict(),
            "accountant": self._accountant.state_dict() if self._accountant else None,
            "step": -1 if self._last is None else self._last.step,
            "guard": self._guard.state_dict() if self._guard else None,
            "shaping": self._shaping.state_dict() if self._shaping else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`: the next step is the one after the last that was applied."""
        self._network.load_state_dict(state["network"])
        self._update.discard()
        self._update.load_state_dict(state["update"])
        if self._accountant is not None and state["accountant"] is not None:
            self._accountant.load_state_dict(state["accountant"])
        if self._guard is not None and state.get("guard") is not None:
            self._guard.load_state_dict(state["guard"])
        if self._shaping is not None and state.get("shaping") is not None:
            self._shaping.load_state_dict(state["shaping"])
        self._pending = None
        step = int(state["step"])
        self._last = None if step < 0 else _applied(step, self._quarantined)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _offer(self, task: str) -> TaskOffer:
        if task not in self._offers:
            raise UnknownNameError("task in this session", task, self._offers)
        return self._offers[task]

    @property
    def _quarantined(self) -> Mapping[str, str]:
        return self._guard.quarantined if self._guard is not None else {}

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Modules of tasks in quarantine stay as they were: without a gradient, DP would still add noise to them."""
        modules = [named_module(self._network, task) for task in self._quarantined]
        kept = [cpu_state(module) for module in modules]
        yield
        for module, state in zip(modules, kept, strict=True):
            module.load_state_dict(state)

    def _expect(self, step: int) -> None:
        expected = 0 if self._last is None else self._last.step + 1
        if step != expected:
            raise ProtocolError(f"the producer is at step {expected}; it cannot serve step {step}")

    def _forward(self, step: int) -> _Forward:
        self._update.discard()
        self._network.train()
        ids = self._sampler.ids(step)
        x = self._source.training(step, ids)
        outputs = dict(self._update.forward(x))
        fixed: dict[str, Tensor] = {}
        if self._fixed is not None and self._dissimilarity.config.omega > 0:
            with torch.no_grad():
                fixed = dict(self._fixed(x))
        return _Forward(step=step, ids=ids, outputs=outputs, fixed=fixed).without(self._quarantined)

    def _evaluate(self, x: Tensor) -> Mapping[str, Tensor]:
        self._network.eval()
        outputs: Mapping[str, Tensor] = self._network(x)
        return outputs

    def _shown(self, task: str, z: Tensor, *, subset: str, start: int) -> Tensor:
        """What a tenant gets of these rows of a subset."""
        if self._release is None:
            return z
        done = 0 if self._last is None else self._last.step + 1
        return self._release.evaluation(z, task=task, steps_done=done, subset=subset, start=start)

    def _batch(self, task: str, forward: _Forward, z: Tensor) -> FeatureBatch:
        if self._release is not None:
            z = self._release.training(z, task=task, step=forward.step)
        try:
            return FeatureBatch(
                contract=self._offers[task].contract,
                step=forward.step,
                subset="train",
                example_ids=forward.ids,
                features=_to_numpy(z),
            )
        except ProtocolError as error:
            if torch.isfinite(z).all():
                raise
            raise NonFiniteLossError(task, forward.step, math.nan) from error

    def _cut_gradients(self, forward: _Forward, gradients: Mapping[str, FeatureGradient]) -> dict[str, Tensor]:
        missing, unknown = set(forward.outputs) - set(gradients), set(gradients) - set(forward.outputs)
        if unknown or (missing and self._guard is None):
            raise ProtocolError(
                f"step {forward.step} needs one gradient of each of {sorted(forward.outputs)}, got {sorted(gradients)}"
            )
        cut = {}
        for task, z in forward.outputs.items():
            if self._accepts(task, gradients.get(task), forward):
                # A copy: what Ray hands over is a read-only view of memory that others share.
                cut[task] = torch.tensor(gradients[task].gradient, device=z.device)
        if not cut:
            raise QuarantineError(dict(self._quarantined))
        return cut

    def _accepts(self, task: str, message: FeatureGradient | None, forward: _Forward) -> bool:
        """Whether the gradient may be applied. Without a guard, what the protocol forbids ends the session."""
        contract, step = self._offers[task].contract, forward.step
        if self._guard is not None:
            labels = self._labels[task]["train"][forward.ids]
            return self._guard.accepts(message, contract=contract, step=step, labels=labels)
        if message is not None and isinstance(message.loss, float) and not math.isfinite(message.loss):
            raise NonFiniteLossError(task, message.step, message.loss)
        check_gradient(message, contract=contract, step=step, n_examples=len(forward.ids))
        return True

    def _add_dissimilarity(self, forward: _Forward, cut: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
        """Add omega * dS/dz to ``cut`` in place (MetaMorphosis, eq. 6). Fixed features get no gradient."""
        pull = dissimilarity_pull(self._dissimilarity, forward.outputs, fixed=forward.fixed, step=forward.step)
        for task, gradient in pull.gradients.items():
            cut[task] += gradient
        return pull.value, {f"{i}|{j}": similarity for (i, j), similarity in pull.by_pair.items()}


class _Forward:
    """A batch whose graph waits for its gradients."""

    __slots__ = ("fixed", "ids", "outputs", "step")

    def __init__(
        self, *, step: int, ids: NDArray[np.int64], outputs: dict[str, Tensor], fixed: dict[str, Tensor]
    ) -> None:
        self.step, self.ids, self.outputs, self.fixed = step, ids, outputs, fixed

    def without(self, tasks: Collection[str]) -> _Forward:
        """The same batch for the other tasks."""
        outputs = {task: z for task, z in self.outputs.items() if task not in tasks}
        return _Forward(step=self.step, ids=self.ids, outputs=outputs, fixed=self.fixed)


def _applied(step: int, quarantined: Mapping[str, str]) -> StepReport:
    """Stands for a step whose report was lost with the process that made it."""
    return StepReport(
        step=step,
        losses={},
        dissimilarity=0.0,
        epsilon_spent=0.0,
        dissimilarity_by_pair={},
        quarantined=dict(quarantined),
    )


def _to_numpy(z: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(z.detach().to("cpu", torch.float32).numpy())


def build_offers(
    *,
    specs: Mapping[str, Any],
    shape: tuple[int, ...],
    backbone: str,
    split_index: int,
    n_train: int,
    n_features: int,
    bits_per_feature: float | None,
) -> dict[str, TaskOffer]:
    """One offer per task; every task of a session has a feature of the same shape and channel."""
    if not specs:
        raise ConfigError("no task to train: name at least one with --tasks")
    return {
        name: TaskOffer(
            spec=spec,
            contract=FeatureContract(task=name, shape=shape),
            backbone=backbone,
            split_index=split_index,
            n_train=n_train,
            n_features=n_features,
            bits_per_feature=bits_per_feature,
        )
        for name, spec in specs.items()
    }
