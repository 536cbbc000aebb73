from __future__ import annotations

import pytest
import torch
from torch import nn

from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.models.heads import HeadConfig, build_head
from orchestrator.models.resnet import build_backbone
from orchestrator.models.split import MAX_SPLIT, MIN_IMAGE_SIZE, MIN_SPLIT, build_encoder, feature_shape

# SPEC C.1: split index to feature of a 64x64 image, encoder weights, weights of a 10-class head.
RESNET18 = {
    4: ((64, 16, 16), 9_536, 11_172_106),
    5: ((64, 16, 16), 157_504, 11_024_138),
    6: ((128, 8, 8), 683_072, 10_498_570),
    7: ((256, 4, 4), 2_782_784, 8_398_858),
    8: ((512, 2, 2), 11_176_512, 5_130),
    9: ((512, 1, 1), 11_176_512, 5_130),
}


def n_weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def head_config(k: int, *, n_outputs: int = 10, backbone: str = "resnet18", image_size: int = 64) -> HeadConfig:
    shape = feature_shape(backbone, k, image_size)
    return HeadConfig(kind="backbone", backbone=backbone, split_index=k, n_outputs=n_outputs, feature_shape=shape)


@pytest.mark.parametrize("k", RESNET18)
def test_encoder_and_head_have_the_weights_that_the_published_sizes_imply(k):
    shape, encoder_weights, head_weights = RESNET18[k]
    assert feature_shape("resnet18", k, 64) == shape
    assert n_weights(build_encoder("resnet18", k, seed=0)) == encoder_weights
    assert n_weights(build_head(head_config(k), seed=0)) == head_weights


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("image_size", [8, 30, 33])
def test_the_shape_that_is_told_is_the_shape_that_comes_out(backbone, image_size):
    whole = build_encoder(backbone, MAX_SPLIT, seed=0).eval()
    x = torch.zeros(2, 3, image_size, image_size)
    with torch.no_grad():
        for k, layer in enumerate(whole, start=MIN_SPLIT):
            x = layer(x)
            assert feature_shape(backbone, k, image_size) == tuple(x.shape[1:]), k


@pytest.mark.parametrize("k", range(MIN_SPLIT, MAX_SPLIT + 1))
def test_encoder_and_head_of_one_seed_are_the_two_halves_of_the_backbone(k):
    whole = build_backbone("resnet18", n_outputs=3, seed=7).eval()
    encoder = build_encoder("resnet18", k, seed=7).eval()
    head = build_head(head_config(k, n_outputs=3, image_size=32), seed=7).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(head(encoder(x)), whole(x))
    assert {**encoder.state_dict(), **head.state_dict()}.keys() == whole.state_dict().keys()


def test_the_encoder_is_the_first_children_of_the_backbone_and_nothing_else():
    encoder = build_encoder("resnet18", 5, seed=0)
    assert isinstance(encoder, nn.Sequential)
    children = list(build_backbone("resnet18", n_outputs=2, seed=0).children())
    assert [type(layer) for layer in encoder] == [type(layer) for layer in children[:5]]


@pytest.mark.parametrize("k", [0, 10, -1])
@pytest.mark.parametrize(
    "ask", [lambda k: build_encoder("resnet50", k, seed=0), lambda k: feature_shape("resnet50", k, 64)]
)
def test_a_bad_split_index_is_refused_with_the_range_and_the_useful_shapes_of_that_backbone(k, ask):
    with pytest.raises(ConfigError) as caught:
        ask(k)
    text = str(caught.value)
    assert "between 1 and 9" in text
    assert f"got {k};" in text
    for words in ("5 gives 256x16x16", "6 gives 512x8x8", "7 gives 1024x4x4", "8 gives 2048x2x2", "9 gives 2048x1x1"):
        assert words in text


@pytest.mark.parametrize("ask", [lambda: build_encoder("vgg16", 5, seed=0), lambda: feature_shape("vgg16", 5, 64)])
def test_an_unknown_backbone_is_refused_with_the_known_ones(ask):
    with pytest.raises(UnknownNameError, match="'vgg16'; known: resnet18, resnet34, resnet50"):
        ask()


@pytest.mark.parametrize("size", [-8, 0, 1, MIN_IMAGE_SIZE - 1])
def test_images_too_small_for_the_backbone_are_refused_with_the_smallest_size(size):
    with pytest.raises(ConfigError, match=f"at least {MIN_IMAGE_SIZE}"):
        feature_shape("resnet18", 5, size)


def test_on_images_of_four_pixels_the_first_block_would_see_signs_only():
    """Why there is a smallest size: GroupNorm of two numbers a group leaves a pair of opposite signs."""
    block = build_encoder("resnet18", 5, seed=0)[4][0]
    x = 100 * torch.randn(1, 64, 1, 1, generator=torch.Generator().manual_seed(0))  # the stem makes 1x1 of up to 4x4
    with torch.no_grad():
        normalised = block.bn1(x).abs()
    torch.testing.assert_close(normalised, torch.ones_like(normalised), atol=1e-3, rtol=0)


@pytest.mark.parametrize("k", [5, 8, 9])
def test_the_smallest_images_still_train_encoder_and_head(k):
    encoder, head = build_encoder("resnet18", k, seed=0), build_head(head_config(k, image_size=8), seed=1)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = head(encoder(x))
    logits.square().sum().backward()
    assert logits.shape == (3, 10)
    assert float((logits[0] - logits[1]).detach().abs().max()) > 1e-3
    assert all(torch.isfinite(p.grad).all() for p in (*encoder.parameters(), *head.parameters()))
