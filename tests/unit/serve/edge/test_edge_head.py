"""A head's file at the edge: its card, and files that are none."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_head import CARD, MAP_CARD, small_head, small_map_head

from serve.edge.card import HeadCard
from serve.edge.errors import HeadError
from serve.edge.head import Head


def test_answers_are_a_softmax_over_the_classes(tmp_path):
    path = small_head(tmp_path / "head.onnx")
    head = Head.load(path)
    z = np.random.default_rng(0).standard_normal((5, *CARD.feature_shape)).astype(np.float32)
    logits = head.logits(z)
    for row, answer in zip(logits, head.answers(z), strict=True):
        shares = np.exp(row) / np.exp(row).sum()
        np.testing.assert_allclose(answer.probabilities, shares, rtol=1e-6)
        assert answer.label == CARD.classes[row.argmax()]
        assert answer.probability == max(answer.probabilities)
    assert head.answers(z[:0]) == []


def test_large_logits_do_not_overflow(tmp_path):
    head = Head.load(small_head(tmp_path / "head.onnx"))
    answer = head.answers(np.full((1, *CARD.feature_shape), 1e30, np.float32))[0]
    assert sum(answer.probabilities) == pytest.approx(1)


def test_a_feature_of_another_shape_is_refused(tmp_path):
    head = Head.load(small_head(tmp_path / "head.onnx"))
    with pytest.raises(HeadError, match="takes features of shape"):
        head.logits(np.zeros((1, 3, 4, 4), np.float32))


def test_a_head_answers_with_classes_or_with_maps_and_says_which(tmp_path):
    classes, maps = Head.load(small_head(tmp_path / "head.onnx")), Head.load(small_map_head(tmp_path / "map.onnx"))
    z = np.random.default_rng(0).standard_normal((3, *MAP_CARD.feature_shape)).astype(np.float32)
    assert maps.maps(z).shape == (3, 2, 9, 6)
    assert np.ptp(maps.maps(z)[0]) > 0
    with pytest.raises(HeadError, match="answers with a map"):
        maps.answers(z)
    with pytest.raises(HeadError, match="answers with a class"):
        classes.maps(z)
    with pytest.raises(HeadError, match="takes features of shape"):
        maps.maps(z[:, :3])


@pytest.mark.parametrize("card", [CARD, MAP_CARD])
def test_a_card_survives_its_file(card):
    assert HeadCard.from_metadata(card.to_metadata()) == card


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("format", None, "it is no head"),
        ("format", "other", "it is no head"),
        ("format_version", "2", "export the head anew"),
        ("task", None, "damaged"),
        ("classes", "[", "damaged"),
        ("classes", "[]", "neither or both of classes and a map"),
        ("answer_shape", "[1, 16, 16]", "neither or both of classes and a map"),
        ("answer_shape", "[1, 0, 16]", "damaged"),
        ("answer_shape", "16", "damaged"),
        ("feature_shape", "[8, 0]", "damaged"),
        ("feature_shape", '["8"]', "damaged"),
    ],
)
def test_properties_that_are_not_a_cards_are_refused(key, value, told):
    data = CARD.to_metadata()
    data.pop(key, None)
    if value is not None:
        data[key] = value
    with pytest.raises(HeadError, match=told):
        HeadCard.from_metadata(data)


def test_files_that_are_no_head_are_refused_in_one_line(tmp_path):
    missing, junk, foreign = tmp_path / "missing.onnx", tmp_path / "junk.onnx", tmp_path / "foreign.onnx"
    junk.write_bytes(b"\x00\x01 no onnx")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, foreign)
    told_of = {missing: "cannot read", junk: "no ONNX file", foreign: "it is no head", tmp_path: "cannot read"}
    for path, told in told_of.items():
        with pytest.raises(HeadError, match=told) as raised:
            Head.load(path)
        assert "\n" not in str(raised.value)
    helper.set_model_props(model, CARD.to_metadata())
    onnx.save(model, foreign)
    with pytest.raises(HeadError, match="other inputs and outputs"):
        Head.load(foreign)
