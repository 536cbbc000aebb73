"""What is served is what was evaluated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from served import SIZE, Shop, digit_images, png

from orchestrator.errors import ConfigError, DataError, NotPublishedError, PrivacyRefusal
from orchestrator.evaluation.collect import collect
from orchestrator.privacy.bounded.channel import RELEASE_STEP
from orchestrator.runs.observer import SilentObserver
from serve.model import TaskModel
from serve.versions import served_version

N = 20


@pytest.fixture(scope="module")
def evaluated(shop_template, tmp_path_factory):
    with Shop(shop_template, tmp_path_factory.mktemp("state")) as shop:
        return collect(
            shop.catalog, SilentObserver(), encoder_version="1", data=None, targets=(), storage=shop_template, threads=1
        )


def assert_same(z: np.ndarray, wanted: np.ndarray) -> None:
    """But for a value of u here and there that lies on the edge between two float16, and moves with the batch."""
    np.testing.assert_allclose(z, wanted, atol=2**-9 * float(np.abs(wanted).max()))
    assert np.abs(z - wanted).mean() < 1e-5


@pytest.mark.parametrize("task", ["loop", "large", "digit"])
def test_features_are_those_of_evaluation_for_the_same_files(shop, evaluated, task):
    rows = evaluated.rows["test"][:N]
    files = [png(image) for image in evaluated.opened.table.images[rows]]
    model = shop.model(task)
    z = model.features(np.stack([model.module.pixels(file) for file in files]))
    wanted = evaluated.features[task].features["test"][:N]
    assert z.shape == wanted.shape and z.dtype == np.float32
    assert_same(z, wanted)


def test_a_bounded_feature_comes_with_the_same_noise_however_often_it_is_asked_for(shop):
    images = digit_images(N)
    model = shop.model("digit")
    once, again = model.features(images), shop.model("digit").features(images)
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(once, np.round(once / RELEASE_STEP) * RELEASE_STEP)
    exact = model.module._network(torch.from_numpy(model.encoder.encode(images)).float()).numpy()
    off = (once - exact).std() / model.module.release.channel.noise
    assert 0.7 < off < 1.3, "the noise is the channel's"


def test_an_images_feature_does_not_depend_on_the_batch(shop):
    images = digit_images(N)
    for task in ("loop", "digit"):
        model = shop.model(task)
        alone = np.concatenate([model.features(image[None]) for image in images])
        assert_same(alone, model.features(images))


def test_half_precision_is_close(shop):
    half = TaskModel.load(shop.catalog, "1", "loop", storage=shop.home, device="cpu", arithmetic="half")
    z, wanted = half.features(digit_images(N)), shop.model("loop").features(digit_images(N))
    assert z.dtype == np.float32
    assert not np.array_equal(z, wanted)
    np.testing.assert_allclose(z, wanted, atol=0.05 * float(np.abs(wanted).max()))


def test_a_private_task_cannot_be_loaded(shop):
    with pytest.raises(PrivacyRefusal, match="never served"):
        shop.model("parity")


def test_an_unknown_task_names_the_known_ones(shop):
    with pytest.raises(NotPublishedError, match="digit, large, loop"):
        shop.model("lop")


def test_a_bounded_task_needs_its_noise_key(shop, tmp_path):
    with pytest.raises(ConfigError, match="noise key"):
        TaskModel.load(shop.catalog, "1", "digit", storage=tmp_path, device="cpu")


def test_the_card_says_what_was_published_and_nothing_of_others(shop):
    record = shop.catalog.tasks("1")["digit"]
    card = shop.model("digit").module.card
    assert card.version == served_version(record) == f"1.2-{record.module_sha256[:12]}"
    assert card.feature_shape == (3, 1, 1) and card.bits_per_feature == pytest.approx(4)
    assert card.classes == tuple("0123456789")
    assert card.guarantee == record.guarantee_text and "at most 4.00 bits" in card.guarantee
    told = str(card.to_json())
    assert not any(name in told for name in ("loop", "parity", "digits", "sqlite"))


def test_pixels_are_limited_before_they_are_unpacked(shop):
    model = shop.model("loop")
    big = png(np.zeros((101, 100, 3), np.uint8))
    assert model.module.pixels(big, max_pixels=10_100).shape == (SIZE, SIZE, 3)
    with pytest.raises(DataError, match="more than 10,099"):
        model.module.pixels(big, max_pixels=10_099)


def test_images_of_another_size_are_refused(shop):
    with pytest.raises(DataError, match="pixels a side"):
        shop.model("loop").features(np.zeros((1, 8, 8, 3), np.uint8))
