import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchvision import transforms

from tasks.datasets.table import IMAGENET, Normalisation
from tasks.errors import DataError
from tasks.transforms import mirror, to_tensor

IMAGES = hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.just(3)))


@settings(deadline=None)
@given(IMAGES)
def test_it_is_what_torchvision_makes_of_each_image(images):
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET.mean, IMAGENET.std)])
    x = to_tensor(images, IMAGENET)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    torch.testing.assert_close(x, torch.stack([reference(image) for image in images]), rtol=1e-6, atol=1e-6)


def test_black_and_white_come_to_known_numbers():
    images = np.stack([np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)])
    half = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.25))
    assert to_tensor(images, half)[:, :, 0, 0].tolist() == [[-1.0, -1.0, -2.0], [1.0, 1.0, 2.0]]


@settings(deadline=None)
@given(IMAGES)
def test_mirroring_exchanges_left_and_right_and_twice_is_the_identity(images):
    x = to_tensor(images, IMAGENET)
    assert torch.equal(mirror(x), to_tensor(images[:, :, ::-1], IMAGENET))
    assert torch.equal(mirror(mirror(x)), x)


def test_read_only_images_are_accepted_and_left_as_they_are():
    images = np.full((1, 2, 2, 3), 7, np.uint8)
    images.flags.writeable = False
    to_tensor(images, IMAGENET).zero_()
    assert (images == 7).all()


def test_no_image_gives_an_empty_batch():
    assert to_tensor(np.zeros((0, 4, 4, 3), np.uint8), IMAGENET).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 4, 4, 3), np.float32), np.zeros((1, 3, 4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8)],
    ids=["floats", "channels first", "one image"],
)
def test_anything_but_a_batch_of_byte_images_is_refused(images):
    with pytest.raises(DataError, match=r"images must be \(B, H, W, 3\) uint8, got"):
        to_tensor(images, IMAGENET)
