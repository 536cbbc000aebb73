"""Heads as ONNX files for the edge. Needs torch and onnx; whoever runs the file needs onnxruntime alone.

Written by the older of torch's two exporters: it alone gives an opset 17 that an onnxruntime of 2023 loads, in one
file. What comes out is run beside the torch module before anybody gets it.
Axes: B examples, C, H, W of the feature.
"""

from __future__ import annotations

import io
import warnings
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.errors import DataError, MissingExtraError
from orchestrator.models.seeding import seeded
from serve.edge.card import INPUT, HeadCard
from tasks.spec import TaskSpec

OPSET: Final = 17
"""What onnxruntime 1.16.3 runs, the last for glibc 2.27 (JetPack 4)."""
TOLERANCE: Final = 1e-4
"""Of the larger of 1 and the largest number that comes out."""
_CHECKED: Final = (1, 2, 7)
"""Batch sizes on which both are compared. The graph is traced with 2, so a batch that was fixed would show."""


def card_of(spec: TaskSpec, version: str, feature_shape: tuple[int, ...]) -> HeadCard:
    """What the file of a head of that task says of it."""
    return HeadCard(
        task=spec.name,
        version=version,
        feature_shape=feature_shape,
        classes=spec.classes,
        answer_shape=spec.shape,
    )


def export_head(head: nn.Module, card: HeadCard) -> bytes:
    """The ONNX file of a head in evaluation mode, with its card inside: (B, C, H, W) to logits or maps, for any B.

    Raises `DataError` if it does not answer as the torch module does, to `TOLERANCE`; `MissingExtraError` without onnx.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingExtraError("tenant", "onnx") from error
    twin = _exportable(head, card.feature_shape).eval()
    batch = {0: "batch"}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the exporter is the older one, and that shapes become constants
        torch.onnx.export(
            twin,
            (torch.zeros(2, *card.feature_shape),),
            buffer,  # type: ignore[arg-type] # the older exporter takes a file too
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[card.output],
            dynamic_axes={INPUT: batch, card.output: batch},
        )
    model = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, card.to_metadata())
    onnx.checker.check_model(model)
    body: bytes = model.SerializeToString()
    check_equal(head, body, card)
    return body


def check_equal(head: nn.Module, body: bytes, card: HeadCard) -> None:
    """Raise `DataError` unless the file answers as the head does, on random features of several sizes and scales."""
    import onnxruntime

    session = onnxruntime.InferenceSession(body, providers=["CPUExecutionProvider"])
    device = next((p.device for p in head.parameters()), torch.device("cpu"))
    for n in _CHECKED:
        for scale in (0.1, 1.0, 10.0):
            with seeded(n):
                z_BCHW = scale * torch.randn(n, *card.feature_shape)
            with torch.no_grad():
                wanted = head(z_BCHW.to(device)).cpu().numpy()
            got = session.run([card.output], {INPUT: z_BCHW.numpy()})[0]
            if not got.shape == wanted.shape == (n, *card.output_shape):
                raise DataError(
                    f"the exported head of task {card.task!r} gives {got.shape}, torch {wanted.shape}, and the task's "
                    f"answers to {n} features are {(n, *card.output_shape)}; nothing was written"
                )
            off = float(np.abs(got - wanted).max()) / max(1.0, float(np.abs(wanted).max()))
            if not off <= TOLERANCE:
                raise DataError(
                    f"the exported head of task {card.task!r} is off by {off:.2g} from the one in torch, "
                    f"{TOLERANCE:g} is allowed; nothing was written"
                )


def _exportable(head: nn.Module, feature_shape: tuple[int, ...]) -> nn.Module:
    """The same head on the CPU, with what the exporter does not know said in other words. Shares no weights."""
    import copy

    twin = copy.deepcopy(head).to("cpu")
    first = next(iter(twin.named_children()), None)
    if first is not None and isinstance(first[1], nn.AdaptiveAvgPool2d):
        setattr(twin, first[0], _Pool(feature_shape[1:], first[1].output_size))
    return twin


class _Pool(nn.Module):
    """Adaptive average pooling as two matrix products: the exporter knows it only for sides that divide evenly."""

    def __init__(self, sides: tuple[int, ...], pooled: Any) -> None:
        super().__init__()
        rows, columns = pooled
        self.rows = nn.Parameter(averaging(sides[0], rows), requires_grad=False)
        self.columns = nn.Parameter(averaging(sides[1], columns).T.contiguous(), requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, rows, columns)."""
        pooled: Tensor = self.rows @ z @ self.columns
        return pooled


def averaging(side: int, cells: int) -> Tensor:
    """(cells, side): cell i is the mean of positions floor(i * side / cells) to ceil((i + 1) * side / cells)."""
    matrix = torch.zeros(cells, side)
    for i in range(cells):
        start, stop = i * side // cells, -(-(i + 1) * side // cells)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix
