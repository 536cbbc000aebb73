"""Per-example gradients of a module, from the gradients at its outputs. Axes: B examples."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.errors import PrivacyRefusal, ProtocolError
from orchestrator.privacy.accounting import load_opacus
from orchestrator.privacy.clipping import PartClip
from orchestrator.shard import WHOLE, Shard


class PerExampleHooks:
    """Clipped sums of per-example gradients, by Opacus's layer hooks. Holds B gradients of the whole module at once.

    `orchestrator.privacy.clipping.ClippedGradients` is another way to the same sums, for fewer kinds of layer.

    life:  idle --forward--> recorded --accumulate--> clipped --apply--> idle;  reset leads back to idle from anywhere
    The hooks record only between forward and accumulate: other uses of the module leave no trace.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        generator: torch.Generator,
        parts: Mapping[str, PartClip] | None = None,
    ) -> None:
        """Raises `PrivacyRefusal` for ``parts``: Opacus clips all weights as one."""
        if parts is not None:
            raise PrivacyRefusal(
                "parts of this network cannot be clipped apart: for that its trained layers must be Conv2d, Linear or "
                "GroupNorm, without shared weights"
            )
        load_opacus()
        from opacus.grad_sample import GradSampleHooks
        from opacus.optimizers import DPOptimizer

        self._module = module
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # Hooks without the wrapping module: the names in state_dict stay as they are.
        self._hooks = GradSampleHooks(module, batch_first=True, loss_reduction="mean", strict=True)
        self._hooks.disable_hooks()
        self._optimizer = DPOptimizer(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction="mean",
            generator=generator,
        )
        self._verified = False

    def forward(self, x: Tensor) -> Any:
        """Run the module and record the layers' inputs."""
        if len(x) == 0:
            return self._module(x)
        self._hooks.enable_hooks()
        try:
            return self._module(x)
        except RuntimeError as error:
            if "modified inplace" not in str(error):
                raise
            raise PrivacyRefusal(
                f"a layer changes its input in place, so there are no per-example gradients: {error}; "
                "write out = out + x instead of out += x"
            ) from error
        finally:
            self._hooks.disable_hooks()

    def accumulate(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], n_examples: int) -> None:
        """Sum the per-example gradients, each clipped over all parameters jointly. Raises before any weight changes."""
        self._optimizer.zero_grad(set_to_none=True)
        if n_examples:
            self._hooks.enable_hooks()
            try:
                with warnings.catch_warnings():
                    # The first trained layer's input needs no gradient, and computing one would only silence torch.
                    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
                    torch.autograd.backward(list(outputs), list(gradients))
            finally:
                self._hooks.disable_hooks()
        for name, parameter in self._parameters.items():
            self._complete(name, parameter, n_examples)
        self._optimizer.clip_and_accumulate()
        for name, parameter in self._parameters.items():
            if not torch.isfinite(parameter.summed_grad).all():  # type: ignore[attr-defined]
                raise ProtocolError(f"the cut gradient is so large that the gradient of {name!r} is not finite")
        self._verified = self._verified or n_examples > 0

    def _complete(self, name: str, parameter: nn.Parameter, n_examples: int) -> None:
        """Make sure that the parameter has exactly one gradient per example."""
        plain: Tensor | None = parameter.grad
        per_example: Tensor | None = parameter.grad_sample  # type: ignore[attr-defined]
        if per_example is None:
            if plain is not None and plain.any():
                raise PrivacyRefusal(
                    f"parameter {name!r} is used outside its layer, where per-example gradients are lost"
                )
            # Not reached from these outputs: its gradient is zero for every example, and it is noised like the others.
            parameter.grad_sample = parameter.new_zeros((n_examples, *parameter.shape))  # type: ignore[attr-defined]
            return
        if not isinstance(per_example, Tensor) or len(per_example) != n_examples:
            raise PrivacyRefusal(
                f"the layer of parameter {name!r} does not keep one row per image: the batch axis is mixed"
            )
        if not self._verified and plain is not None:
            error, size = (per_example.mean(0) - plain).norm(), per_example.abs().mean(0).norm()
            if error > 1e-2 * size:  # far above the rounding of any precision in use, far below a real mistake
                raise PrivacyRefusal(f"the per-example gradients of {name!r} do not add up to its gradient")

    def apply(self, shard: Shard = WHOLE) -> None:
        """Add the noise, divide by the expected batch size, and update the weights.

        Shards add up their clipped sums, to which the first one has added the noise: one draw for all of them.
        """
        if shard.first:
            self._optimizer.add_noise()
        else:
            for parameter in self._parameters.values():
                parameter.grad = parameter.summed_grad.view_as(parameter)  # type: ignore[attr-defined]
        shard.sum_gradients(self._parameters.values())
        self._optimizer.scale_grad()
        self._optimizer.original_optimizer.step()

    def reset(self) -> None:
        """Forget everything that was recorded."""
        for layer in self._module.modules():
            layer.__dict__.pop("activations", None)
            layer.__dict__.pop("max_batch_len", None)
        for parameter in self._parameters.values():
            parameter.__dict__.pop("_current_grad_sample", None)
            parameter.__dict__.update(_forward_counter=0, grad_sample=None, summed_grad=None)
            parameter.grad = None

    def close(self) -> None:
        """Take the hooks off the module again."""
        self.reset()
        self._hooks.cleanup()
        for parameter in self._parameters.values():
            parameter.__dict__.pop("summed_grad", None)
