from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.models.heads import HeadConfig, build_head
from orchestrator.privacy.dp import refuse_unsafe
from tasks.spec import TaskSpec


def config(**changes: object) -> HeadConfig:
    values = {"kind": "linear", "backbone": "resnet18", "split_index": 6, "n_outputs": 3, "feature_shape": (128, 8, 8)}
    return HeadConfig(**{**values, **changes})  # type: ignore[arg-type]


def test_the_linear_head_is_an_affine_map_of_the_map_pooled_to_four_by_four():
    head = build_head(config(), seed=0).double()
    (linear,) = [layer for layer in head if isinstance(layer, nn.Linear)]
    z = torch.randn(2, 128, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pooled = z.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    expected = pooled.reshape(2, -1) @ linear.weight.T + linear.bias
    torch.testing.assert_close(head(z), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "n_weights"), [((512, 1, 1), 512), ((512, 2, 3), 512 * 6), ((64, 16, 16), 64 * 16)])
def test_the_linear_head_pools_no_map_up(shape, n_weights):
    head = build_head(config(feature_shape=shape), seed=0)
    assert sum(p.numel() for p in head.parameters()) == 3 * (n_weights + 1)
    assert head(torch.zeros(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize("kind", ["linear", "mlp", "backbone"])
def test_heads_can_stand_behind_a_private_encoder(kind):
    refuse_unsafe(build_head(config(kind=kind), seed=0))


def test_the_mlp_head_is_two_affine_maps_with_a_relu_between():
    head = build_head(config(kind="mlp", feature_shape=(8, 1, 1)), seed=0).double()
    first, second = [layer for layer in head if isinstance(layer, nn.Linear)]
    z = torch.randn(5, 8, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = (z.flatten(1) @ first.weight.T + first.bias).clamp_min(0)
    assert hidden.shape == (5, 128)
    torch.testing.assert_close(head(z), hidden @ second.weight.T + second.bias, rtol=1e-12, atol=1e-12)


def test_at_the_last_split_the_backbone_head_is_the_last_layer_alone():
    head = build_head(config(kind="backbone", split_index=9, feature_shape=(512, 1, 1)), seed=0)
    assert [type(layer) for layer in head] == [nn.Flatten, nn.Linear]


def test_the_backbone_head_takes_maps_of_any_size():
    head = build_head(config(kind="backbone", feature_shape=(128, 5, 7)), seed=0)
    assert head(torch.zeros(2, 128, 5, 7)).shape == (2, 3)


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 4, 4), (64, 16, 16)])
def test_the_map_head_answers_at_the_resolution_of_the_task_whatever_that_of_the_feature(shape):
    spec = TaskSpec(name="t", target="t", shape=(3, 6, 8), head="map", loss="mse", metrics=("psnr",))
    made = HeadConfig.for_task(spec, kind="mlp", backbone="resnet18", split_index=5, feature_shape=shape)
    head = build_head(made, seed=0)
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert head(z).shape == (2, 3, 6, 8)
    head(z)[0].sum().backward()
    assert z.grad[0].abs().sum() > 0 and z.grad[1].abs().sum() == 0
    refuse_unsafe(head)


def test_a_task_with_classes_gets_the_head_that_was_asked_for():
    spec = TaskSpec(name="t", target="t", classes=("a", "b"))
    made = HeadConfig.for_task(spec, kind="mlp", backbone="resnet18", split_index=6, feature_shape=(4, 1, 1))
    assert made == config(kind="mlp", n_outputs=2, feature_shape=(4, 1, 1))
    assert "answer_size" not in made.to_json()


@pytest.mark.parametrize("change", [{"kind": "map"}, {"answer_size": (4, 4)}, {"kind": "map", "answer_size": (0, 4)}])
def test_a_head_and_an_answer_that_do_not_go_together_are_refused(change):
    with pytest.raises(ConfigError, match=r"do not go together|cannot answer"):
        config(**change)


@pytest.mark.parametrize("kind", ["linear", "mlp", "backbone", "map"])
def test_a_configuration_survives_json_and_builds_the_same_head(kind):
    original = config(kind=kind, answer_size=(4, 4) if kind == "map" else None)
    again = HeadConfig.from_json(json.loads(json.dumps(original.to_json())))
    assert again == original
    one, two = build_head(original, seed=3).state_dict(), build_head(again, seed=3).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one | two)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": "red"}, "unknown key.*colour"),
        ({"kind": None}, "expected str"),
        ({"n_outputs": "3"}, "expected int"),
        ({"feature_shape": [128, 8]}, "feature_shape"),
    ],
)
def test_json_with_anything_but_the_known_keys_and_types_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        HeadConfig.from_json({**config().to_json(), **change})


def test_json_that_lacks_a_key_is_refused():
    data = config().to_json()
    del data["n_outputs"]
    with pytest.raises(ConfigError, match="n_outputs"):
        HeadConfig.from_json(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split_index": 0}, "between 1 and 9"),
        ({"n_outputs": 0}, "at least one output, got 0"),
        ({"feature_shape": (128, 0, 8)}, r"shape \(C, H, W\), got \(128, 0, 8\)"),
        ({"kind": "backbone", "feature_shape": (64, 8, 8)}, "takes a feature of 128 channels, got 64x8x8"),
        ({"kind": "backbone", "split_index": 9, "feature_shape": (512, 2, 2)}, "feature of 512x1x1, got 512x2x2"),
    ],
)
def test_a_head_that_could_not_be_built_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        config(**change)


def test_unknown_kinds_and_backbones_are_refused_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="no head named 'tree'; known: backbone, linear, map, mlp"):
        config(kind="tree")
    with pytest.raises(UnknownNameError, match="no backbone named 'vgg'"):
        config(backbone="vgg")
