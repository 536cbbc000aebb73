"""The shell around a task: what a replica refuses to be, what it holds, and when it is taken for stuck."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from served import CATALOG, Shop, digit_images

from orchestrator.errors import CheckpointError, NonFiniteFeatureError, PrivacyRefusal
from orchestrator.privacy.bounded.keyed_noise import ImageDigests
from serve.arguments import CatalogArgs, EncoderArgs, ReplicaArgs, TaskArgs, VersionArgs

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own code, when it is loaded


def args_of(shop: Shop, task: str, **changes: object) -> TaskArgs:
    version = shop.model(task).module.card.version if task != "parity" else "1.1-x"
    given: dict = {
        "task": task,
        "source": CatalogArgs(tracking_uri=shop.catalog.uri, catalog=CATALOG, storage=str(shop.home), device="cpu"),
        "registry": str(shop.places.registry),
        "streams": str(shop.state / "streams"),
        "current": VersionArgs(encoder_version="1", version=version),
    }
    return TaskArgs(**{**given, **changes})


def test_a_replica_does_not_start_as_another_version_than_it_is_to_be(shop):
    from serve.app import TaskEndpoint

    other = VersionArgs(encoder_version="2", version=shop.model("loop").module.card.version)
    with pytest.raises(CheckpointError, match="is to be served"):
        TaskEndpoint(args_of(shop, "loop", current=other))


def test_a_replica_of_a_private_task_does_not_start(shop):
    from serve.app import TaskEndpoint

    with pytest.raises(PrivacyRefusal, match="never served"):
        TaskEndpoint(args_of(shop, "parity"))


def test_a_replica_holds_both_versions(shop):
    from serve.app import TaskEndpoint

    canary = VersionArgs(encoder_version="2", version=shop.model("loop", "2").module.card.version)
    endpoint = TaskEndpoint(args_of(shop, "loop", canary=canary, share=0.25))
    images = digit_images(4)
    for encoder, lane in zip("12", endpoint._service.lanes.all(), strict=True):
        wanted = shop.model("loop", encoder).features(images)
        found = lane.infer(images, ImageDigests.of(images))
        np.testing.assert_allclose(found, wanted, atol=2**-9 * float(np.abs(wanted).max()))
    identity = endpoint.identity()
    assert identity["versions"] == {shop.model("loop").module.card.version: 0.75, canary.version: 0.25}


def test_a_replica_whose_thread_is_stuck_is_not_healthy(shop):
    from serve.app import TaskEndpoint

    endpoint = TaskEndpoint(args_of(shop, "loop"))
    endpoint.check_health()
    endpoint._service._publications._since = time.monotonic() - 3600
    with pytest.raises(RuntimeError, match="computing for more than"):
        endpoint.check_health()


@pytest.mark.parametrize(("most", "taken"), [(1, True), (2, False)])
def test_a_replica_takes_publications_past_serve_unless_serve_counts_them_to_scale_by(shop, monkeypatch, most, taken):
    from serve import middlewares
    from serve.app import TaskEndpoint

    monkeypatch.setattr(middlewares, "_OWN", {})
    app = TaskEndpoint(args_of(shop, "loop", replicas=ReplicaArgs(max_replicas=most))).__serve_build_asgi_app__()
    assert ({"/tasks/loop/features": ("/tasks/loop", app)} if taken else {}) == middlewares._OWN


def test_serve_is_told_what_a_replica_costs_and_where_it_runs():
    fixed = ReplicaArgs(num_cpus=0.3, min_replicas=2, max_replicas=2).options()
    assert fixed["num_replicas"] == 2 and "autoscaling_config" not in fixed
    assert fixed["ray_actor_options"] == {
        "num_cpus": 0.3,
        "num_gpus": 0.0,
        "resources": {"node:__internal_head__": 0.0001},
    }
    scaled = ReplicaArgs(min_replicas=1, max_replicas=3, pin=None).options()
    assert scaled["autoscaling_config"]["max_replicas"] == 3 and "resources" not in scaled["ray_actor_options"]


def test_a_shared_encoder_encodes_an_image_once_for_all_who_ask(shop, monkeypatch):
    from serve.app import SharedEncoder

    source = args_of(shop, "loop").source
    encoder = SharedEncoder(EncoderArgs(source=source, encoder_version="1"))
    asked = []

    async def batched(pixels):
        asked.append(pixels)
        await asyncio.sleep(0.05)
        return encoder._encoder.encode(pixels[None])[0]

    monkeypatch.setattr(encoder._jobs, "do", batched)
    one, two = digit_images(2)

    async def scenario():
        return await asyncio.gather(*(encoder.encode(image, bytes(image)) for image in (one, two, one, one)))

    found = asyncio.run(scenario())
    assert len(asked) == 2
    np.testing.assert_array_equal(found[0], found[3])
    np.testing.assert_array_equal(found[1], shop.model("loop").encoder.encode(two[None])[0])


def test_a_shared_encoder_that_failed_for_an_image_tries_again(shop, monkeypatch):
    from serve.app import SharedEncoder

    encoder = SharedEncoder(EncoderArgs(source=args_of(shop, "loop").source, encoder_version="1"))
    answers = [NonFiniteFeatureError("inf"), np.zeros((1, 1, 1), np.float16)]

    async def batched(pixels):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(encoder._jobs, "do", batched)

    async def scenario():
        with pytest.raises(NonFiniteFeatureError):
            await encoder.encode(digit_images(1)[0], b"x")
        return await encoder.encode(digit_images(1)[0], b"x")

    assert asyncio.run(scenario()).shape == (1, 1, 1)
