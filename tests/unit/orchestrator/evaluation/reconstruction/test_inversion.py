import dataclasses

import numpy as np
import pytest
import torch
from squares import mixed
from tiny import TINY_NETWORK
from torch import nn

from orchestrator.errors import ConfigError, DataError
from orchestrator.evaluation.reconstruction.base import PixelNetwork, pixels
from orchestrator.evaluation.reconstruction.baselines import Lookup, mean_image, nearest_image
from orchestrator.evaluation.reconstruction.inversion import OptimisationInversion, total_variation
from orchestrator.evaluation.reconstruction.metrics import compare
from orchestrator.network import NetworkConfig
from tasks.datasets.table import Normalisation
from tasks.transforms import to_tensor

HALF = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def through(network):
    return lambda x: network(pixels(x)).numpy()


def test_an_image_is_found_again_through_the_weights_of_a_random_encoder(world):
    network = PixelNetwork(HALF, NetworkConfig(split_index=3).build_encoder(seed=0))
    data = world(through(network), n=(40, 10, 4), network=network)
    images = OptimisationInversion(iterations=100).run(data)
    assert compare(images, pixels(data.test_x)).psnr > compare(mean_image(data, 4), pixels(data.test_x)).psnr + 15


def test_an_orthogonal_map_is_inverted_exactly(world):
    class Shuffled(nn.Module):
        def forward(self, x):
            return torch.nn.functional.pixel_unshuffle(x, 4).flip(1)

    network = Shuffled()
    data = world(through(network), n=(40, 10, 4), network=network)
    assert compare(OptimisationInversion(iterations=300).run(data), pixels(data.test_x)).psnr > 40


def test_images_do_not_depend_on_which_others_are_inverted_beside_them(world):
    network = PixelNetwork(HALF, TINY_NETWORK.build_encoder(seed=0))
    data = world(through(network), n=(40, 10, 4), network=network)
    attack = OptimisationInversion(iterations=10)
    together, apart = attack.run(data), dataclasses.replace(attack, batch_size=1).run(data)
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=0)


def test_only_as_many_images_as_asked_for_are_inverted(world):
    network = PixelNetwork(HALF, nn.Identity())
    data = world(through(network), n=(40, 10, 9), network=network)
    assert len(OptimisationInversion(iterations=1, images=5).run(data)) == 5


def test_the_encoder_is_left_as_it_was(world):
    network = PixelNetwork(HALF, TINY_NETWORK.build_encoder(seed=0))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    OptimisationInversion(iterations=3).run(world(through(network), n=(20, 10, 2), network=network))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_an_attacker_without_the_weights_is_refused(world):
    with pytest.raises(DataError, match="needs the encoder"):
        OptimisationInversion().run(world(mixed))


def test_a_pixel_network_normalises_as_training_does(world):
    images = world(mixed).test_x
    torch.testing.assert_close(PixelNetwork(HALF, nn.Identity())(pixels(images)), to_tensor(images, HALF))


def test_total_variation_counts_every_step_between_neighbours():
    x = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).view(1, 1, 2, 2)
    assert total_variation(x).item() == 2.0


def test_no_iterations_are_no_attack():
    with pytest.raises(ConfigError, match="iterations must be above 0"):
        OptimisationInversion(iterations=0)


def test_a_lookup_finds_an_image_that_the_attacker_already_has(world):
    data = world(mixed)
    data = dataclasses.replace(data, test_x=data.train_x[5:9], test_z=data.train_z[5:9])
    torch.testing.assert_close(Lookup().run(data), pixels(data.train_x[5:9]))
    torch.testing.assert_close(nearest_image(data, 4), pixels(data.train_x[5:9]))


def test_no_lookup_comes_nearer_than_the_nearest_image(world):
    data = world(lambda x: np.random.default_rng(0).normal(size=(len(x), 2, 4, 4)).astype(np.float32))
    originals = pixels(data.test_x)

    def distances(x):
        return (x - originals).square().flatten(1).sum(dim=1)

    assert (distances(nearest_image(data, len(originals))) <= distances(Lookup().run(data)) + 1e-4).all()


def test_the_mean_image_is_the_mean_of_the_attacker_s_images(world):
    data = world(mixed)
    np.testing.assert_allclose(mean_image(data, 2)[1].permute(1, 2, 0), data.train_x.mean(axis=0) / 255, atol=1e-5)
