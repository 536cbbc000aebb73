"""What may cross a party boundary: no image, no open label, and nothing that was not agreed."""

import dataclasses
import pickle
import typing

import numpy as np
import pytest

from orchestrator import wire
from orchestrator.errors import ProtocolError
from orchestrator.wire import FeatureBatch, FeatureContract, FeatureGradient

CONTRACT = FeatureContract(task="loop", shape=(4, 2, 2))


def batch(features, ids=None, contract=CONTRACT):
    ids = np.arange(len(features), dtype=np.int64) if ids is None else ids
    return FeatureBatch(contract=contract, step=0, subset="train", example_ids=ids, features=features)


def test_an_image_cannot_be_put_into_a_feature():
    with pytest.raises(ProtocolError, match="float32"):
        batch(np.zeros((3, 4, 2, 2), np.uint8))
    with pytest.raises(ProtocolError, match="shape"):
        batch(np.zeros((3, 3, 64, 64), np.float32))


def test_no_message_has_a_field_that_could_hold_open_labels_or_images():
    """Integers cross only as example ids and counts; the only arrays are features, gradients and a head's weights."""
    arrays = {}
    for message in wire.MESSAGES:
        hints = typing.get_type_hints(message)
        assert {f.name for f in dataclasses.fields(message)} & {"label", "labels", "image", "images", "x", "u"} == set()
        for name, hint in hints.items():
            if "ndarray" in str(hint):
                arrays[message.__name__, name] = hint
    assert set(arrays) == {
        ("FeatureBatch", "example_ids"),
        ("FeatureBatch", "features"),
        ("FeatureGradient", "gradient"),
        ("HeadWeights", "state"),
    }


def test_example_ids_cannot_carry_labels_of_another_type_or_shape():
    z = np.zeros((2, 4, 2, 2), np.float32)
    for ids in (np.zeros(2, np.int32), np.zeros((2, 1), np.int64), np.zeros(2)):
        with pytest.raises(ProtocolError):
            batch(z, ids=ids)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused(value):
    z = np.zeros((2, 4, 2, 2), np.float32)
    z[1, 2, 0, 0] = value
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        batch(z)
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        CONTRACT.check("the gradient", z, 2)


def test_rows_must_match_the_ids():
    with pytest.raises(ProtocolError, match="shape"):
        batch(np.zeros((3, 4, 2, 2), np.float32), ids=np.arange(2, dtype=np.int64))


def test_an_empty_batch_is_a_message_like_any_other():
    assert len(batch(np.zeros((0, 4, 2, 2), np.float32)).example_ids) == 0


def test_messages_survive_pickling():
    message = FeatureGradient(contract=CONTRACT, step=3, gradient=np.ones((1, 4, 2, 2), np.float32), loss=0.5)
    copy = pickle.loads(pickle.dumps(message))
    assert copy.step == 3
    assert np.array_equal(copy.gradient, message.gradient)
