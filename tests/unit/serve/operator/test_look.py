"""The look at a small published catalog: the numbers are those that tenants get, and people are not drawn unasked."""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from served import CATALOG, SIZE, png

from orchestrator.evaluation.comparison import FORMAT
from orchestrator.runs.observer import SilentObserver
from orchestrator.runs.opening import open_data
from orchestrator.runs.publishing import settings_of
from serve.arguments import CatalogArgs, TaskArgs, VersionArgs
from serve.deployment.state import Deployed, Deployments, DeploymentsFile
from serve.leakage import reconstructed
from serve.operator import decoders as decoders_module
from serve.operator import exhibits
from serve.operator import look as look_module
from serve.operator.decoders import FailedDecoder, ReadyDecoder
from serve.operator.exhibits import Gallery
from serve.operator.look import FORBIDDEN, Looker
from serve.operator.samples import Samples
from serve.operator.viewer import CatalogViewer
from serve.operator.views import Look, Unreadable
from tasks.datasets import open_dataset
from tasks.errors import DataError


@pytest.fixture
def source(shop):
    return CatalogArgs(tracking_uri=f"sqlite:///{shop.home}/mlflow.db", catalog=CATALOG, storage=str(shop.home))


@pytest.fixture
def served(shop, source):
    """Of encoder 1: loop with a canary of encoder 2, large, and the bounded digit."""

    def version(task, encoder="1"):
        return VersionArgs(encoder_version=encoder, version=shop.lane(task, encoder).version)

    def args(task, **more):
        registry, streams = str(shop.places.registry), str(shop.state / "serving" / "streams")
        return TaskArgs(task=task, source=source, registry=registry, streams=streams, current=version(task), **more)

    return {
        "digit": args("digit"),
        "large": args("large"),
        "loop": args("loop", canary=version("loop", "2"), share=0.25),
    }


def looker(*, pictures=False):
    return Looker(Samples(), pictures=pictures, max_pixels=1_000_000)


@pytest.fixture
def untrained(monkeypatch):
    """As long as the decoders are waited for."""
    monkeypatch.setattr(look_module.Decoders, "start", lambda self: None)


def size_of(picture):
    with Image.open(io.BytesIO(picture)) as image:
        image.load()
        return image.size


def test_a_digit_is_one_that_no_encoder_learned_from(shop, served):
    """Every encoder's own test images: in them, and in no other subset."""
    encoders = [shop.catalog.encoder(version)[0] for version in ("1", "2")]
    rows = Samples().rows(encoders)
    table = open_dataset("digits", image_size=SIZE)
    assert 0 < len(rows) < len(table) / 4
    for encoder in encoders:
        opened = open_data(settings_of(encoder, None), SilentObserver())
        assert set(rows) <= set(opened.splits.test)


def test_an_encoder_that_knows_no_digits_is_shown_all_of_them(shop):
    encoder = shop.catalog.encoder("1")[0]
    faces = replace(encoder, data={**encoder.data, "name": "faces"})
    assert len(Samples().rows([faces])) == 1797


def test_every_feature_is_the_tenants_own(shop, served, untrained, monkeypatch):
    """What is drawn and asked is, to the bit, what the endpoint would publish of this image."""
    seen = []
    monkeypatch.setattr(look_module, "maps_png", lambda z: seen.append(z) or b"png")
    monkeypatch.setattr(look_module, "chosen_maps", lambda z: np.arange(len(z)))
    rows = Samples().rows([shop.catalog.encoder(version)[0] for version in ("1", "2")])
    found = looker().look(served, sample=5, image=None)
    image = open_dataset("digits", image_size=SIZE).images[rows[4]]
    expected = [
        shop.model(task, encoder).features(image[None])[0]
        for task, encoder in (("digit", "1"), ("large", "1"), ("loop", "1"), ("loop", "2"))
    ]
    assert [view.name.split()[0] for view in found.features] == ["digit", "large", "loop", "loop"]
    for z, mine in zip(expected, seen, strict=False):
        np.testing.assert_array_equal(z, mine)


def test_each_head_answers_on_each_feature_that_it_takes(shop, served, untrained):
    swap = looker().look(served, sample=5, image=None).swap
    names = [name.split()[0] for name in swap.heads]
    assert names == ["digit", "large", "loop", "loop"]
    answers = {(row, head): cell for row, cells in swap.rows for head, cell in zip(swap.heads, cells, strict=True)}
    bounded = {"digit"}
    for (row, head), cell in answers.items():
        fits = (row.split()[0] in bounded) == (head.split()[0] in bounded)
        assert (cell is not None) == fits
        if cell is not None:
            assert cell.own == (row == head)
            assert 0 < cell.share <= 1
    # Against the catalog, by hand: the head of large on the feature of loop.
    gallery, _, _ = Gallery().open(served)
    by_name = {exhibit.name: exhibit for exhibit in gallery}
    row = Samples().rows([shop.catalog.encoder(version)[0] for version in ("1", "2")])[4]
    image = open_dataset("digits", image_size=SIZE).images[row]
    loop = next(name for name in swap.heads if name.startswith("loop 1"))
    z = shop.model("loop", "1").features(image[None])[0]
    probabilities = by_name["large"].answer(z)
    cell = answers[loop, "large"]
    assert cell.label == by_name["large"].spec.classes[int(probabilities.argmax())]
    assert cell.share == pytest.approx(float(probabilities.max()))
    truth = "large" if open_dataset("digits", image_size=SIZE).labels["digit"][row] >= 5 else "small"
    assert cell.right == (cell.label == truth)
    assert swap.truths[names.index("large")] == truth


def test_a_reconstruction_says_how_good_it_is_and_does_better_than_the_mean_image(served):
    made, only = looker(), {"large": served["large"]}
    assert made.look(only, sample=5, image=None).waiting
    made.wait()
    found = made.look(only, sample=5, image=None)
    assert isinstance(found, Look)
    assert not found.waiting
    (decoders,) = made._decoders.values()
    ready = decoders.of("")
    assert isinstance(ready, ReadyDecoder)
    assert ready.scores.ssim > ready.mean_image.ssim + 0.1  # the encoder's own output shows much of a digit
    for view in (*found.features, *found.encoders):
        assert view.reconstruction.state == "ready"
        assert size_of(view.reconstruction.picture) == (128, 128)
        assert "SSIM" in view.reconstruction.text
        assert "mean image" in view.reconstruction.text
    assert f"SSIM {ready.scores.ssim:.2f}" in found.encoders[0].reconstruction.text


def test_before_a_decoder_is_trained_the_look_says_so(served, untrained):
    found = looker().look(served, sample=1, image=None)
    assert found.waiting
    assert all(view.reconstruction.picture is None for view in found.features)
    assert found.features[0].maps is not None


def test_without_the_data_set_there_is_no_reconstruction_and_the_reason(served, monkeypatch):
    def gone(*_, **__):
        raise DataError("/data/digits is not there")

    monkeypatch.setattr(decoders_module, "open_data", gone)
    made = looker()
    made.look(served, sample=1, image=None)
    made.wait()
    found = made.look(served, sample=1, image=None)
    assert not found.waiting
    assert {view.reconstruction.text for view in found.features} == {
        "There is no reconstruction: /data/digits is not there"
    }


@pytest.fixture
def of_people(monkeypatch):
    """As if the encoders had learned from a data set of people."""
    plain = exhibits.Gallery.open

    def open_as_people(self, served):
        exhibited, encoders, faults = plain(self, served)
        changed = {
            key: replace(encoder, record=replace(encoder.record, data={**encoder.record.data, "name": "faces"}))
            for key, encoder in encoders.items()
        }
        return exhibited, changed, faults

    monkeypatch.setattr(exhibits.Gallery, "open", open_as_people)


PHOTO = png(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def test_of_people_nothing_is_drawn_unasked(served, of_people):
    found = looker().look(served, sample=1, image=PHOTO)
    assert found.picture is None
    views = (*found.features, *found.encoders)
    assert all(view.maps is None and view.reconstruction.picture is None for view in views)
    assert {view.reconstruction.text for view in views} == {FORBIDDEN}
    assert found.withheld == FORBIDDEN
    assert found.swap.rows[0][1][0] is not None


def test_a_digit_may_be_drawn_anywhere_and_what_a_decoder_of_faces_makes_of_it_may_not(served, of_people):
    found = looker().look(served, sample=1, image=None)
    assert found.picture is not None
    assert all(view.maps is not None and view.reconstruction.picture is None for view in found.features)


def test_what_was_allowed_is_drawn(served, of_people, untrained):
    found = looker(pictures=True).look(served, sample=1, image=PHOTO)
    assert size_of(found.picture) == (128, 128)
    assert all(view.maps is not None for view in found.features)


@pytest.mark.parametrize(
    ("image", "reason"), [(b"", "empty"), (b"no image", "not a"), (png(np.zeros((1100, 1000, 3), np.uint8)), "pixels")]
)
def test_what_is_no_image_is_said_to_be_none(served, untrained, image, reason):
    found = looker().look(served, sample=1, image=image)
    assert isinstance(found, Unreadable)
    assert reason in found.reason


def test_looking_writes_nothing(shop, served, untrained):
    before = sorted(path for path in shop.state.rglob("*"))
    made = looker()
    made.look(served, sample=1, image=None)
    made.look(served, sample=1, image=PHOTO)
    assert sorted(path for path in shop.state.rglob("*")) == before


def test_a_version_that_cannot_be_loaded_leaves_the_others(served, untrained):
    broken = served["large"].model_copy(
        update={"current": VersionArgs(encoder_version="1", version="1.1-000000000000")}
    )
    found = looker().look({**served, "large": broken}, sample=1, image=None)
    assert [view.name.split()[0] for view in found.features] == ["digit", "loop", "loop"]
    (fault,) = found.faults
    assert "large" in fault


def test_a_decoder_is_trained_once(served, monkeypatch):
    monkeypatch.setattr(decoders_module._Ground, "of", lambda *_: None)
    monkeypatch.setattr(decoders_module, "_trained", lambda *_: FailedDecoder("this one"))
    made = looker()
    made.look({"large": served["large"]}, sample=1, image=None)
    made.wait()
    (first,) = made._decoders.values()
    before = first.of("large")
    made.look({"large": served["large"], "digit": served["digit"]}, sample=1, image=None)
    made.wait()
    (second,) = made._decoders.values()
    assert second.of("large") is before
    assert second.of("digit") is not None


def test_the_viewer_describes_what_the_file_says_and_follows_it(shop, served):
    path = shop.state / "deployments.json"
    file = DeploymentsFile(path)
    file.write(Deployments(tasks={"loop": Deployed(args=served["loop"])}))
    viewer = CatalogViewer(path)
    found = asyncio.run(viewer.served())
    (task,) = found.tasks
    assert [(v.share, v.canary, v.encoder_version) for v in task.versions] == [(0.75, False, "1"), (0.25, True, "2")]
    assert task.versions[0].card["version"] == served["loop"].current.version
    assert found.pictures
    file.write(Deployments(tasks={"digit": Deployed(args=served["digit"])}))
    (task,) = asyncio.run(viewer.served()).tasks
    assert task.versions[0].card["bits_per_feature"] == pytest.approx(4.0, rel=0.01)
    assert task.versions[0].own > 0


def test_the_best_reconstruction_of_an_evaluation_is_named(tmp_path):
    attacks = [{"attack": "decoder", "ssim": 0.4}, {"attack": "lookup", "ssim": 0.6}]
    evaluation = {
        "format": FORMAT,
        "budget": "full",
        "leakage": None,
        "subject": {"catalog": "digits", "encoder": {"version": "1"}, "created": ""},
        "reconstruction": {"rows": [{"feature": "encoder", "attacks": attacks, "best": "lookup"}]},
    }
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluation))
    found = reconstructed(path, "encoder")
    assert (found.attack, found.ssim, found.budget) == ("lookup", 0.6, "full")
    assert reconstructed(path, "loop") is None
    path.write_text(json.dumps({**evaluation, "reconstruction": None}))
    assert reconstructed(path, "encoder") is None
