"""Clipped sums of per-example gradients, at little more than the cost of plain ones.

One backward gives dL/d(output) of every trained layer, and no weight's gradient. From it and the layer's input come

    norms   of each example's gradient: from the gradients themselves, which are then kept, or from Gram matrices
            ("ghost norms"), whichever is smaller (Li et al. 2022, arXiv 2110.05679; Bu et al. 2022, arXiv 2205.10683)
    sums    of the clipped gradients: of those that were kept, or the plain weight gradient of outputs' gradients
            that are scaled example by example ("book keeping", Bu et al. 2023, arXiv 2210.00038)

Axes: B examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from orchestrator.errors import ConfigError, PrivacyRefusal, ProtocolError
from orchestrator.privacy.layer_gradients import RULES, LayerGradients, layers_without_rule, trained_names
from orchestrator.shard import WHOLE, Shard

_CLIP_EPSILON: Final = 1e-6
"""Added to a norm before dividing by it, as Opacus does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartClip:
    """How one part of the weights is clipped and noised apart from the rest."""

    max_grad_norm: float
    """Of one example's gradient over the part's weights."""
    noise_multiplier: float
    """Standard deviation of the part's noise over its clipping norm."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise ConfigError(f"a part's max_grad_norm must be a finite number > 0, got {self.max_grad_norm}")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ConfigError(f"a part's noise_multiplier must be a finite number >= 0, got {self.noise_multiplier}")


class ClippedGradients:
    """Clips each example's gradient over all trained weights jointly, or part by part; sums, adds noise, and updates.

    life:  idle --forward--> recorded --accumulate--> clipped --apply--> idle;  reset leads back to idle from anywhere
    The layers are watched only inside forward: other uses of the module leave no trace.
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
        """``parts`` maps beginnings of parameter names to their own clip and noise; "" is the rest, the longest counts.

        Raises `PrivacyRefusal` for a layer whose per-example gradients are not known here, and `ConfigError` for parts
        that leave a parameter out, or that together are noised less than by ``noise_multiplier``, which is accounted.
        """
        if unknown := layers_without_rule(module):
            raise PrivacyRefusal(f"no rule for the per-example gradients of {', '.join(unknown)}; freeze it")
        self._module, self._optimizer, self._generator = module, optimizer, generator
        self._expected_batch_size = expected_batch_size
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._layers = {
            name: RULES[type(layer)](layer) for name, layer in module.named_modules() if trained_names(layer)
        }
        whole = PartClip(max_grad_norm=max_grad_norm, noise_multiplier=noise_multiplier)
        self._parts = {"": whole} if parts is None else dict(parts)
        _check_accounted(noise_multiplier, self._parts.values())
        self._part_of = _assign(self._parts, list(self._parameters))
        self._anchor = torch.zeros((), requires_grad=True)
        self._records: dict[str, _Record] = {}
        self._sums: dict[str, Tensor] = {}
        self._verified = False

    def forward(self, x: Tensor) -> Any:
        """Run the module and record the layers' inputs."""
        self._records = {}
        with self._watching(len(x)), _in_place_is_refused():
            return self._module(x)

    def accumulate(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], n_examples: int) -> None:
        """Sum the clipped gradients. Raises before any weight changes."""
        sums = self._clipped_sums(outputs, gradients, n_examples) if n_examples else {}
        self._records = {}
        # Not reached from these outputs: its gradient is zero for every example, and it is noised like the others.
        self._sums = {name: sums[name] if name in sums else torch.zeros_like(p) for name, p in self._parameters.items()}

    def apply(self, shard: Shard = WHOLE) -> None:
        """Add the noise, divide by the expected batch size, and update the weights.

        Shards add up their clipped sums, to which the first one has added the noise: one draw for all of them.
        """
        for name, parameter in self._parameters.items():
            parameter.grad = self._sums[name] + self._noise(name) if shard.first else self._sums[name]
        shard.sum_gradients(self._parameters.values())
        for parameter in self._parameters.values():
            assert parameter.grad is not None
            parameter.grad /= self._expected_batch_size
        self._optimizer.step()

    def reset(self) -> None:
        """Forget everything that was recorded."""
        self._records, self._sums = {}, {}
        for parameter in self._parameters.values():
            parameter.grad = None

    def close(self) -> None:
        """Nothing is left on the module."""
        self.reset()

    @contextmanager
    def _watching(self, n_examples: int) -> Iterator[None]:
        """Inside, every trained layer's input is recorded, and its output's gradient is led past the record."""

        def watch(name: str) -> Callable[..., Any]:
            def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Any:
                if name in self._records:
                    raise PrivacyRefusal(f"the layer {name!r} is used twice in one forward; use two layers")
                x: Tensor = inputs[0] if inputs else named["input"]
                self._layers[name].check(name, x, output, n_examples)
                self._records[name] = record = _Record(self._layers[name], x.detach(), x._version)
                return _Tap.apply(output, self._anchor, record)

            return hook

        handles = [
            layer.module.register_forward_hook(watch(name), with_kwargs=True)
            for name, layer in (self._layers.items() if n_examples else ())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _clipped_sums(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], n_examples: int
    ) -> dict[str, Tensor]:
        """Parameter name to its sum. ``gradients`` are those of the mean loss."""
        # Each example's gradient is back-propagated at size 1, so that its squares neither overflow nor vanish.
        size = torch.stack([dz.flatten(1).abs().amax(1) for dz in gradients]).amax(0)
        size = size.clamp(min=torch.finfo(size.dtype).tiny)
        plain = self._back_propagate(outputs, [dz / size.view(-1, *[1] * (dz.ndim - 1)) for dz in gradients])
        reached = {name: record for name, record in self._records.items() if record.received}
        if not self._verified:
            self._verify(reached, plain)
        factors = {part: self._factors(part, reached, n_examples * size) for part in self._parts}
        return _named_sums({name: (record, factors[self._part_of[name]]) for name, record in reached.items()})

    def _back_propagate(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor | None]:
        """Complete the records. Returns the weights' plain gradients where they are still to be compared."""
        for record in self._records.values():
            record.awaited = True
        compared = {} if self._verified else self._parameters
        # Only what leads to the anchor is computed: no weight's gradient, and nothing before the first trained layer.
        wanted = [self._anchor, *compared.values()]
        with _in_place_is_refused():
            found = torch.autograd.grad(list(outputs), wanted, list(gradients), allow_unused=True)
        return dict(zip(compared, found[1:], strict=True))

    def _verify(self, reached: Mapping[str, _Record], plain: Mapping[str, Tensor | None]) -> None:
        """Once: unclipped, the sums must be what autograd itself says. A weight may be used outside its layer."""
        ones = {name: (record, torch.ones_like(record.squares)) for name, record in reached.items()}
        sums, sizes = _named_sums(ones), {name: float(r.squares.sqrt().sum()) for name, r in reached.items()}
        for name, expected in plain.items():
            if expected is None:
                continue
            if name not in sums:
                raise PrivacyRefusal(
                    f"parameter {name!r} is used outside its layer, where per-example gradients are lost"
                )
            error = float((sums[name] - expected).norm())
            # Far above the rounding of any precision in use, far below a real mistake. A gradient that should be zero
            # is rounding alone, which only the others can measure.
            if error > 1e-2 * sizes[_layer_of(name)] + 1e-6 * sum(sizes.values()):
                raise PrivacyRefusal(f"the per-example gradients of {name!r} do not add up to its gradient")
        self._verified = True

    def _factors(self, part: str, reached: Mapping[str, _Record], weights: Tensor) -> Tensor:
        """(B,): what takes each example's gradient over the part, times ``weights``, to at most the part's norm."""
        squares = torch.zeros_like(weights)
        for name, record in reached.items():
            if self._part_of[name] == part:
                squares += record.squares
        norms = weights * squares.sqrt()
        if not torch.isfinite(norms).all():
            raise ProtocolError("the cut gradient is so large that the gradient of an image is not finite")
        return weights * (self._parts[part].max_grad_norm / (norms + _CLIP_EPSILON)).clamp(max=1.0)

    def _noise(self, name: str) -> Tensor:
        parameter, clip = self._parameters[name], self._parts[self._part_of[_layer_of(name)]]
        if clip.noise_multiplier == 0:
            return torch.zeros_like(parameter)
        noise = torch.empty_like(parameter, requires_grad=False)
        return noise.normal_(0.0, clip.noise_multiplier * clip.max_grad_norm, generator=self._generator)


class _Tap(torch.autograd.Function):
    """The identity, which shows the gradient that passes to a record.

    What it returns may not be changed in place (torch sees to it): the record would be of another value.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, record: _Record) -> Tensor:
        """``anchor`` needs a gradient, so that one passes even where the layer's input needs none."""
        ctx.record = record
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Once for each forward, with the whole gradient."""
        ctx.record.receive(gradient)
        return gradient, None, None


@dataclass(eq=False, slots=True)
class _Record:
    """What one layer did in one forward.

    life:  input --receive--> squares, with rows that are small enough to keep or else (input, gradient)
    """

    layer: LayerGradients
    input: Tensor
    version: int
    """Of the input: torch counts the changes in place."""
    awaited: bool = False
    """Whether the gradient on its way is that of `ClippedGradients.accumulate`, and not somebody else's."""
    received: bool = False
    squares: Tensor = field(default_factory=lambda: torch.empty(0))
    """(B,): of each example's gradient over the layer's weights."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """(B, ...) gradients of each example."""
    pair: tuple[Tensor, Tensor] | None = None

    def receive(self, gradient: Tensor) -> None:
        """Take the gradient of the layer's output."""
        if not self.awaited:
            return
        if self.input._version != self.version:
            raise RuntimeError("the input of a layer was modified by an inplace operation")
        x, self.input, gradient = self.input, gradient.new_empty(0), gradient.detach().contiguous()
        squares = gradient.new_zeros(len(gradient))
        if "bias" in self.layer.trained:
            self.rows["bias"] = self.layer.bias_rows(gradient)
        if "weight" in self.layer.trained:
            if _gram_is_smaller(self.layer.gram_floats(x, gradient), self.layer.module.weight.numel()):
                squares += self.layer.ghost_squares(x, gradient)
                self.pair = (x, gradient)
            else:
                self.rows["weight"] = self.layer.weight_rows(x, gradient)
        for rows in self.rows.values():
            squares += torch.linalg.vector_norm(rows.flatten(1), dim=1).square()
        self.squares, self.received = squares, True

    def sums(self, factors: Tensor) -> dict[str, Tensor]:
        """The layer's parameters' names to the sums of the examples' gradients times their factors (B,)."""
        found = {name: (factors @ rows.flatten(1)).view(rows.shape[1:]) for name, rows in self.rows.items()}
        if self.pair is not None:
            x, gradient = self.pair
            scaled = gradient * factors.view(-1, *[1] * (gradient.ndim - 1))
            found["weight"] = self.layer.weight_sum(x, scaled)
        return found


def _gram_is_smaller(gram: float, weight: int) -> bool:
    """Whether an example's norm is to come from Gram matrices: the floats of these, and of its gradient."""
    return gram < weight


def _layer_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _assign(parts: Mapping[str, PartClip], parameters: Sequence[str]) -> dict[str, str]:
    """Layer name to its part. Raises `ConfigError` for a part of nothing, and a layer of no part or of two."""
    found: dict[str, str] = {}
    for name in parameters:
        part = max((part for part in parts if name.startswith(part)), key=len, default=None)
        if part is None or found.setdefault(_layer_of(name), part) != part:
            raise ConfigError(f"{name!r} and its layer must be of one part; parts: {', '.join(map(repr, parts))}")
    if idle := sorted(part for part in parts if part and part not in found.values()):
        raise ConfigError(f"no parameter begins with {idle[0]!r}; there are {', '.join(parameters)}")
    return found


def _check_accounted(noise_multiplier: float, parts: Collection[PartClip]) -> None:
    """Noises sigma_i on parts cost what one noise sigma costs with 1 / sigma^2 = sum of 1 / sigma_i^2."""
    if noise_multiplier == 0:
        return
    shares = sum((noise_multiplier / p.noise_multiplier) ** 2 if p.noise_multiplier else math.inf for p in parts)
    if shares > 1 + 1e-6:
        raise ConfigError(
            f"the parts' noise is less than the accounted {noise_multiplier:g}: 1 / sigma^2 of the parts must add up "
            f"to at most its own, got {shares:g} times that"
        )


def _named_sums(records: Mapping[str, tuple[_Record, Tensor]]) -> dict[str, Tensor]:
    """Parameter name to its sum, from each layer's record and the examples' factors."""
    return {
        f"{name}.{own}" if name else own: value
        for name, (record, factors) in records.items()
        for own, value in record.sums(factors).items()
    }


@contextmanager
def _in_place_is_refused() -> Iterator[None]:
    """torch notices a change in place, in its own words."""
    try:
        yield
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise PrivacyRefusal(
            f"a layer's input or output is changed in place, so there are no per-example gradients: {error}; "
            "write out = out + x instead of out += x"
        ) from error
