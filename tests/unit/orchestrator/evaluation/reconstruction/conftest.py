import pytest
from squares import squares

from orchestrator.evaluation.reconstruction.base import ReconstructionInput


@pytest.fixture
def world():
    def made(encode, *, n=(160, 40, 40), seed=0, network=None):
        subsets = ("train", "validation", "test")
        parts = {subset: squares(size, seed=i) for i, (subset, size) in enumerate(zip(subsets, n, strict=True))}
        return ReconstructionInput(
            **{f"{name}_x": x for name, x in parts.items()},
            **{f"{name}_z": encode(x) for name, x in parts.items()},
            seed=seed,
            network=network,
        )

    return made
