import pytest
import torch

from orchestrator.errors import UnknownNameError
from orchestrator.evaluation.reconstruction.decoders import DECODERS, build_decoder, halvings

MEAN = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize(("shape", "size"), [((8, 4, 4), 16), ((5, 1, 1), 16), ((4, 16, 16), 16), ((6, 3, 3), 17)])
def test_every_kind_makes_images_of_the_right_size_from_any_map(kind, shape, size):
    decoder = build_decoder(kind, shape, mean_image=torch.rand(3, size, size), width=8, seed=0)
    assert decoder(torch.randn(2, *shape)).shape == (2, 3, size, size)


@pytest.mark.parametrize(("shape", "size", "n"), [((1, 16, 16), 64, 2), ((1, 1, 1), 64, 6), ((1, 3, 3), 17, 3)])
def test_halvings_are_those_that_the_encoder_made(shape, size, n):
    assert halvings(shape, size) == n


@pytest.mark.parametrize("kind", ["pixel_shuffle", "staged"])
def test_before_training_the_stronger_kinds_answer_with_the_mean_image(kind):
    decoder = build_decoder(kind, (8, 4, 4), mean_image=MEAN, width=8, seed=0)
    torch.testing.assert_close(decoder(torch.randn(2, 8, 4, 4)), MEAN.expand(2, -1, -1, -1))


def test_weights_are_decided_by_the_seed_and_leave_the_process_alone():
    before = torch.get_rng_state()
    first, again, other = (build_decoder("staged", (8, 4, 4), mean_image=MEAN, width=8, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [decoder.body[0].weight for decoder in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_unknown_kind_is_named_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="pixel_shuffle"):
        build_decoder("gan", (8, 4, 4), mean_image=MEAN, width=8, seed=0)
