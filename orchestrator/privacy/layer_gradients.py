"""What each kind of layer knows of its per-example gradients, from its input and its output's gradient.

Axes: B examples, C channels, P pixels of the input, L positions of the output.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.errors import PrivacyRefusal

_TEMPORARY_BYTES: Final = 8 * 2**20
"""Of what is computed on the way to a layer's norms and thrown away. About a processor's cache: more is slower."""
_ROUNDING: Final = 100
"""Of an inner product of Gram matrices, in units of the precision: several times what sums of a thousand terms have."""
_NARROW: Final = 16
"""Channels below which oneDNN's convolutions, which work on blocks of 16, are slower than a matrix product."""


class LayerGradients(ABC):
    """A trained layer, and how its gradients are had from its input and its output's gradient."""

    ndim: int | None = None
    """Of the input that is understood; None: any with a batch axis and one more."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.trained = trained_names(module)

    def check(self, name: str, x: Tensor, output: Tensor, n_examples: int) -> None:
        """Raise `PrivacyRefusal` unless every row is one image's."""
        if len(x) != n_examples or len(output) != n_examples or x.ndim != (self.ndim or max(2, x.ndim)):
            raise PrivacyRefusal(f"the layer {name!r} does not keep one row per image: the batch axis is mixed")

    def gram_floats(self, x: Tensor, gradient: Tensor) -> float:
        """Of the Gram matrices that `ghost_squares` makes of one example; infinite where there is no such way."""
        return math.inf

    @abstractmethod
    def bias_rows(self, gradient: Tensor) -> Tensor:
        """(B, *bias): each example's gradient."""

    @abstractmethod
    def weight_rows(self, x: Tensor, gradient: Tensor) -> Tensor:
        """(B, *weight): each example's gradient."""

    def ghost_squares(self, x: Tensor, gradient: Tensor) -> Tensor:
        """(B,): squared norms of the rows, without the rows."""
        raise NotImplementedError

    def weight_sum(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The sum of the rows, without the rows."""
        raise NotImplementedError


class _Conv2d(LayerGradients):
    ndim = 4

    def __init__(self, module: nn.Conv2d) -> None:
        super().__init__(module)
        left, right, top, bottom = module._reversed_padding_repeated_twice
        self.symmetric = left == right and top == bottom
        self.padding = (top, left) if self.symmetric else (0, 0)

    def _padded(self, x: Tensor) -> Tensor:
        """With what `padding` does not say: an even kernel's padding='same' is not the same on both sides."""
        return x if self.symmetric else functional.pad(x, self.module._reversed_padding_repeated_twice)

    def gram_floats(self, x: Tensor, gradient: Tensor) -> float:
        return float(self.module.groups * (x[0, 0].numel() ** 2 + gradient[0, 0].numel() ** 2))

    def bias_rows(self, gradient: Tensor) -> Tensor:
        return gradient.sum((2, 3))

    def weight_rows(self, x: Tensor, gradient: Tensor) -> Tensor:
        """As one convolution in which every example is a group: its weight gradient is each example's."""
        x, n = self._padded(x), len(x)
        if self.module.weight.shape[1] < _NARROW and self.module.groups == 1:
            return self._narrow_rows(x, gradient)
        rows = self._weight_gradient(x.reshape(1, -1, *x.shape[2:]), gradient.reshape(1, -1, *gradient.shape[2:]), n)
        return rows.view(n, *self.module.weight.shape)

    def _narrow_rows(self, x: Tensor, gradient: Tensor) -> Tensor:
        weight, conv = self.module.weight, self.module
        rows = x.new_empty(len(x), weight.shape[0], weight[0].numel())
        for part in _chunks(len(x), floats=weight[0].numel() * gradient[0, 0].numel()):
            columns = functional.unfold(x[part], conv.kernel_size, conv.dilation, self.padding, conv.stride)
            torch.bmm(gradient[part].flatten(2), columns.transpose(1, 2), out=rows[part])
        return rows.view(len(x), *weight.shape)

    def _weight_gradient(self, x: Tensor, gradient: Tensor, repeats: int = 1) -> Tensor:
        """Of the convolution, or of so many of them side by side."""
        conv, shape = self.module, self.module.weight.shape
        found: Tensor = torch.ops.aten.convolution_backward(
            gradient,
            x,
            x.new_empty(repeats * shape[0], *shape[1:]),  # only its shape counts
            None,
            conv.stride,
            self.padding,
            conv.dilation,
            False,
            [0, 0],
            repeats * conv.groups,
            (False, True, False),
        )[1]
        return found

    def ghost_squares(self, x: Tensor, gradient: Tensor) -> Tensor:
        """<A A^T, G G^T> over the positions, where A A^T adds up from the Gram matrix of the pixels, tap by tap."""
        x, n = self._padded(x), len(x) * self.module.groups
        pixels, rows = x.reshape(n, -1, *x.shape[2:]), gradient.reshape(n, -1, *gradient.shape[2:])
        found = []
        for part in _chunks(len(pixels), floats=pixels[0, 0].numel() ** 2 + 3 * rows[0, 0].numel() ** 2):
            left = self._patches_gram(_gram(pixels[part].flatten(2)), pixels.shape[2:], rows.shape[2:])
            found.append(_inner(left, _gram(rows[part].flatten(2))))
        return torch.cat(found).view(len(x), -1).sum(1)

    def _patches_gram(self, pixels: Tensor, size: torch.Size, out: torch.Size) -> Tensor:
        """(N, L, L) Gram matrix of what the kernel sees, from (N, P, P) of the pixels."""
        pixels = pixels.view(-1, *size, *size)
        found = pixels.new_zeros(len(pixels), *out, *out)
        for row_out, row_in in self._overlaps(0, size, out):
            for column_out, column_in in self._overlaps(1, size, out):
                found[:, row_out, column_out, row_out, column_out] += pixels[:, row_in, column_in, row_in, column_in]
        return found.view(len(pixels), out.numel(), out.numel())

    def _overlaps(self, axis: int, size: torch.Size, out: torch.Size) -> Iterator[tuple[slice, slice]]:
        """For each tap of the kernel: the positions where it meets a pixel, and these pixels."""
        conv, padding = self.module, self.padding[axis]
        stride = conv.stride[axis]
        for tap in range(conv.kernel_size[axis]):
            offset = tap * conv.dilation[axis] - padding
            first, last = max(0, -(offset // stride)), min(out[axis] - 1, (size[axis] - 1 - offset) // stride)
            if first <= last:
                yield slice(first, last + 1), slice(first * stride + offset, last * stride + offset + 1, stride)

    def weight_sum(self, x: Tensor, gradient: Tensor) -> Tensor:
        return self._weight_gradient(self._padded(x), gradient)


class _Linear(LayerGradients):
    def gram_floats(self, x: Tensor, gradient: Tensor) -> float:
        return float(2 * (x[0].numel() // x.shape[-1]) ** 2)

    def bias_rows(self, gradient: Tensor) -> Tensor:
        return _positions(gradient).sum(1)

    def weight_rows(self, x: Tensor, gradient: Tensor) -> Tensor:
        return torch.bmm(_positions(gradient).transpose(1, 2), _positions(x))

    def ghost_squares(self, x: Tensor, gradient: Tensor) -> Tensor:
        a, rows = _positions(x).transpose(1, 2), _positions(gradient).transpose(1, 2)
        parts = _chunks(len(x), floats=3 * a.shape[2] ** 2)
        return torch.cat([_inner(_gram(a[part]), _gram(rows[part])) for part in parts])

    def weight_sum(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient.flatten(0, -2).T @ x.flatten(0, -2)


class _GroupNorm(LayerGradients):
    """One number a channel: rows are as small as can be."""

    def bias_rows(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(*gradient.shape[:2], -1).sum(2)

    def weight_rows(self, x: Tensor, gradient: Tensor) -> Tensor:
        """As the normalisation of one example that has all the examples' channels."""
        n, channels, groups = len(x), self.module.num_channels, self.module.num_groups
        x = x.reshape(n, channels, -1).contiguous()
        positions = x.shape[2]
        _, mean, rstd = torch.native_group_norm(x, None, None, n, channels, positions, groups, self.module.eps)
        rows: Tensor = torch.ops.aten.native_group_norm_backward(
            gradient.view(1, n * channels, positions),
            x.view(1, n * channels, positions),
            mean.view(1, -1),
            rstd.view(1, -1),
            None,
            1,
            n * channels,
            positions,
            n * groups,
            (False, True, True),
        )[1]
        return rows.view(n, channels)


RULES: Final[Mapping[type[nn.Module], Callable[[Any], LayerGradients]]] = {
    nn.Conv2d: _Conv2d,
    nn.Linear: _Linear,
    nn.GroupNorm: _GroupNorm,
}


def layers_without_rule(module: nn.Module) -> list[str]:
    """What `ClippedGradients` cannot train in the module, each with its place."""
    owners: dict[int, str] = {}
    found = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and owners.setdefault(id(parameter), name) != name:
            found.append(f"the parameter {name!r}, which is also {owners[id(parameter)]!r}")
    for name, layer in module.named_modules():
        own = trained_names(layer)
        zeros = getattr(layer, "padding_mode", "zeros") == "zeros"
        if own and not (type(layer) in RULES and own <= {"weight", "bias"} and zeros):
            found.append(f"the {type(layer).__name__} at {name or 'the top'}")
    return found


def trained_names(layer: nn.Module) -> set[str]:
    """Names of the layer's own trained parameters."""
    return {name for name, p in layer.named_parameters(recurse=False) if p.requires_grad}


def _chunks(n: int, *, floats: int) -> Iterator[slice]:
    """Slices of ``n`` rows, each of which fills at most `_TEMPORARY_BYTES`, or holds one row."""
    size = max(1, _TEMPORARY_BYTES // (4 * floats))
    return (slice(start, start + size) for start in range(0, n, size))


def _gram(values: Tensor) -> Tensor:
    """(N, L, L) from (N, C, L)."""
    return torch.bmm(values.transpose(1, 2), values)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """(N,): inner products of Gram matrices.

    Where the terms cancel, rounding could hide a gradient from the clip. It then counts as larger than it is.
    """
    size = torch.linalg.vector_norm(left, dim=(1, 2)) * torch.linalg.vector_norm(right, dim=(1, 2))
    return (left * right).sum((1, 2)).maximum(_ROUNDING * torch.finfo(left.dtype).eps * size)


def _positions(values: Tensor) -> Tensor:
    """(B, L, features) of a linear layer's (B, ..., features)."""
    return values.reshape(len(values), -1, values.shape[-1])
