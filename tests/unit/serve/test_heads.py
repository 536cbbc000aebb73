"""Heads as ONNX files: they answer as torch does, load on old runtimes, and are refused where they do not."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from orchestrator.errors import DataError
from orchestrator.models.heads import HeadConfig, build_head
from serve.edge.card import HeadCard
from serve.edge.head import Head
from serve.heads import averaging, card_of, check_equal, export_head
from tasks.spec import TaskSpec

CASES = [
    ("backbone", "resnet18", 5, (64, 16, 16)),
    ("backbone", "resnet18", 7, (256, 4, 4)),
    ("backbone", "resnet18", 8, (512, 2, 2)),
    ("backbone", "resnet18", 9, (512, 1, 1)),
    ("backbone", "resnet50", 9, (2048, 1, 1)),
    ("linear", "resnet18", 5, (64, 16, 16)),
    ("linear", "resnet18", 7, (256, 14, 14)),
    ("linear", "resnet18", 6, (128, 7, 7)),
    ("linear", "resnet18", 9, (512, 1, 1)),
    ("mlp", "resnet18", 6, (128, 8, 8)),
    ("mlp", "resnet18", 6, (8, 1, 1)),
]
"""Maps of the paper's splits, maps whose sides no pooling divides, and a bounded vector of 8 numbers."""


def head_of(kind: str, backbone: str, split_index: int, shape: tuple[int, int, int]) -> nn.Module:
    config = HeadConfig(kind=kind, backbone=backbone, split_index=split_index, n_outputs=3, feature_shape=shape)
    return build_head(config, seed=1).eval()


def smile_card(shape: tuple[int, int, int]) -> HeadCard:
    return HeadCard(task="smile", version="1.2-0123456789ab", feature_shape=shape, classes=("no", "a bit", "yes"))


@pytest.mark.parametrize(("kind", "backbone", "split_index", "shape"), CASES)
def test_an_exported_head_answers_as_the_one_in_torch(tmp_path, kind, backbone, split_index, shape):
    head, card = head_of(kind, backbone, split_index, shape), smile_card(shape)
    path = tmp_path / "head.onnx"
    path.write_bytes(export_head(head, card))
    loaded = Head.load(path, threads=1)
    assert loaded.card == card
    for n in (1, 3):
        z = torch.randn(n, *shape)
        with torch.no_grad():
            wanted = head(z).numpy()
        np.testing.assert_allclose(loaded.logits(z.numpy()), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("feature", "answer"),
    [
        ((2, 4, 4), (1, 16, 16)),
        ((64, 8, 8), (3, 32, 32)),
        ((64, 7, 5), (2, 9, 13)),
        ((8, 16, 16), (1, 7, 3)),
        ((8, 16, 16), (1, 1, 1)),
        ((8, 1, 1), (1, 16, 16)),
    ],
)
def test_an_exported_head_draws_the_map_that_the_one_in_torch_draws(tmp_path, feature, answer):
    """`thumbnail` of bounded and unbounded features; sides that nothing divides, larger and smaller; a vector."""
    spec = TaskSpec(name="drawing", target="drawing", shape=answer, head="map", loss="mse", metrics=("psnr",))
    config = HeadConfig.for_task(spec, kind="mlp", backbone="resnet18", split_index=5, feature_shape=feature)
    head, card = build_head(config, seed=1).eval(), card_of(spec, "1.2-0123456789ab", feature)
    path = tmp_path / "head.onnx"
    path.write_bytes(export_head(head, card))
    loaded = Head.load(path, threads=1)
    assert loaded.card == card
    assert (card.classes, card.answer_shape) == ((), answer)
    for n in (1, 3):
        z = torch.randn(n, *feature)
        with torch.no_grad():
            wanted = head(z).numpy()
        assert wanted.shape == (n, *answer)
        np.testing.assert_allclose(loaded.maps(z.numpy()), wanted, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 16, 15), (2, 16, 16)])
def test_a_head_that_does_not_answer_as_its_card_says_is_refused(shape):
    spec = TaskSpec(name="drawing", target="drawing", shape=(1, 16, 16), head="map", loss="mse", metrics=("psnr",))
    config = HeadConfig.for_task(spec, kind="mlp", backbone="resnet18", split_index=5, feature_shape=(2, 4, 4))
    card = card_of(spec, "1.2-0123456789ab", (2, 4, 4))
    with pytest.raises(DataError, match="and the task's answers to 1 features are"):
        export_head(build_head(config, seed=1).eval(), dataclasses.replace(card, answer_shape=shape))


def test_the_file_is_of_an_opset_and_a_format_that_old_runtimes_load():
    """onnxruntime 1.16 loads IR 9 and opset 19 at most; JetPack 4 has nothing newer."""
    shape = (64, 16, 16)
    model = onnx.load_from_string(export_head(head_of("backbone", "resnet18", 5, shape), smile_card(shape)))
    assert [opset.version for opset in model.opset_import] == [17]
    assert model.ir_version <= 8
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_an_export_that_answers_otherwise_is_refused():
    shape = (8, 1, 1)
    head, other = head_of("mlp", "resnet18", 6, shape), head_of("mlp", "resnet18", 6, shape)
    with torch.no_grad():
        other.fc.bias += 1e-3
    body = export_head(other, smile_card(shape))
    check_equal(other, body, smile_card(shape))
    with pytest.raises(DataError, match=r"is off by .* nothing was written"):
        check_equal(head, body, smile_card(shape))


class FixedBatch(nn.Module):
    """Its graph has the batch of the trace in it."""

    def forward(self, z):
        return z.reshape(2, -1)[:, :3] if torch.onnx.is_in_onnx_export() else z.flatten(1)[:, :3]


def test_a_head_whose_graph_has_a_fixed_batch_is_refused():
    with pytest.raises((DataError, onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException)):
        export_head(FixedBatch(), smile_card((8, 1, 1)))


@pytest.mark.parametrize(("side", "cells"), [(16, 4), (14, 4), (7, 4), (5, 4), (4, 4), (2, 2), (9, 1)])
def test_pooling_by_a_matrix_is_adaptive_pooling(side, cells):
    z = torch.randn(2, 3, side, side, dtype=torch.float64)
    matrix = averaging(side, cells).double()
    torch.testing.assert_close(matrix @ z @ matrix.T, nn.AdaptiveAvgPool2d((cells, cells))(z), atol=1e-7, rtol=1e-6)


def test_exporting_leaves_the_head_as_it_was():
    shape = (256, 14, 14)
    head = head_of("linear", "resnet18", 7, shape)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    export_head(head, smile_card(shape))
    assert isinstance(head.avgpool, nn.AdaptiveAvgPool2d)
    assert before.keys() == head.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())
