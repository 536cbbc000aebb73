"""Sizes of files as MetaMorphosis printed them, against 4 bytes a weight.

A file also holds names and shapes: a few hundred bytes a tensor, which matters where there are few weights. Table 9 is
in MiB, Tables 10 and 12 in decimal units (SPEC C.1): the same file is 0.61 MB in the one and 640.60 KB in the other.
"""

from __future__ import annotations

import pytest
from torch import nn

from orchestrator.models.heads import HeadConfig, build_head
from orchestrator.models.modules import ModuleConfig, build_module
from orchestrator.models.split import build_encoder, feature_shape

MIB, MB, KB = 2**20, 10**6, 10**3
TOLERANCE = 0.015
BYTES_PER_TENSOR = 600


def size_bytes(module: nn.Module) -> int:
    """About what `torch.save` of the whole module writes."""
    return sum(4 * p.numel() + BYTES_PER_TENSOR for p in module.state_dict().values())


def encoder(k: int) -> nn.Module:
    return build_encoder("resnet18", k, seed=0)


def head(k: int, *, n_outputs: int = 10) -> nn.Module:
    shape = feature_shape("resnet18", k, 64)
    return build_head(
        HeadConfig(kind="backbone", backbone="resnet18", split_index=k, n_outputs=n_outputs, feature_shape=shape),
        seed=0,
    )


@pytest.mark.parametrize(("k", "server", "client"), [(9, 42.66, 0.02), (7, 10.64, 32.04), (5, 0.61, 42.07)])
def test_server_and_client_have_the_sizes_of_table_9(k, server, client):
    assert size_bytes(encoder(k)) / MIB == pytest.approx(server, rel=TOLERANCE)
    # The smallest client is printed with one digit.
    assert size_bytes(head(k)) / MIB == pytest.approx(client, rel=TOLERANCE, abs=0.005)


@pytest.mark.parametrize(("k", "server", "module"), [(5, 640.60, 54.5), (7, 11.20 * 1e3, 791.80), (8, 44.70e3, 3.20e3)])
def test_server_and_module_have_the_sizes_of_table_10(k, server, module):
    channels = feature_shape("resnet18", k, 64)[0]
    g = build_module(ModuleConfig(channels=channels), seed=0)
    assert size_bytes(encoder(k)) / KB == pytest.approx(server, rel=TOLERANCE)
    # One overhead of 5.35 kB for 64 and 256 channels is what says that there are no biases; 3.15 MB was rounded up.
    assert 4 * sum(p.numel() for p in g.parameters()) / KB + 5.35 == pytest.approx(
        module, rel=0.016 if k == 8 else 2e-4
    )


@pytest.mark.parametrize(("k", "provider", "classifier"), [(6, 3.00, 42.00), (7, 11.97, 33.60), (8, 47.9, 0.006)])
def test_provider_and_classifier_have_the_sizes_of_table_12(k, provider, classifier):
    module = build_module(ModuleConfig(channels=feature_shape("resnet18", k, 64)[0]), seed=0)
    assert (size_bytes(encoder(k)) + size_bytes(module)) / MB == pytest.approx(provider, rel=0.02)  # 3.00 is 2.95
    assert size_bytes(head(k, n_outputs=2)) / MB == pytest.approx(classifier, rel=TOLERANCE, abs=0.002)


@pytest.mark.parametrize(("n_tasks", "alone", "with_modules"), [(3, 300.880, 310.792), (2, 300.425, 307.034)])
def test_modules_on_a_segnet_explain_the_sizes_of_tables_3_and_5(n_tasks, alone, with_modules):
    """A checkpoint holds each weight and Adam's two moments (SPEC C.3); a task adds Cross-SEC(64) and a 1x1 of 512."""
    added = [ModuleConfig(channels=64), ModuleConfig(kind="conv1x1", channels=512)]
    weights = sum(p.numel() for config in added for p in build_module(config, seed=0).parameters())
    assert weights == 274_432
    assert alone + n_tasks * weights * 4 * 3 / MB == pytest.approx(with_modules, abs=0.05)
