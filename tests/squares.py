"""Small pictures with six things to know about each, and a feature that keeps all of them."""

from __future__ import annotations

import numpy as np
import torch

from orchestrator.evaluation.reconstruction.base import pixels


def squares(n, *, side=16, seed=0):
    """Coloured squares on a noisy ground: three numbers of place and size, three of colour."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 30, (n, side, side, 3)).astype(np.uint8)
    for image in images:
        top, left = rng.integers(1, side // 2, 2)
        size = rng.integers(4, side // 2 + 1)
        image[top : top + size, left : left + size] = rng.integers(80, 255, 3)
    return images


def mixed(images, *, factor=4, seed=0):
    """An invertible linear map of the pixels: cells of factor x factor, rotated by a random orthogonal matrix."""
    z = torch.nn.functional.pixel_unshuffle(pixels(images), factor)
    rotation, _ = torch.linalg.qr(torch.randn(z.shape[1], z.shape[1], generator=torch.Generator().manual_seed(seed)))
    return torch.einsum("oc,nchw->nohw", rotation, z).numpy()
