"""From a catalog to what attackers who want images back work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn

from orchestrator.assembly import cache_key
from orchestrator.catalog import Catalog
from orchestrator.evaluation.attacks.base import LabelArray
from orchestrator.evaluation.collect import Published
from orchestrator.evaluation.reconstruction.base import PixelNetwork
from orchestrator.evaluation.reconstruction.suite import ShownFeature
from orchestrator.feature_cache import FeatureCache
from orchestrator.models.modules import ModuleConfig, build_module
from orchestrator.network import freeze
from tasks.datasets.splits import SUBSETS
from tasks.datasets.table import ImageArray

ENCODER = "encoder"
"""What the encoder's own output is called among features. No task's: it is what a tenant with the paper's producer on
its own machine, or a thief of the cache, would hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """The arguments of `evaluate_reconstruction`."""

    shown: Mapping[str, ShownFeature] = field(repr=False)
    images: Mapping[str, ImageArray] = field(repr=False)
    labels: Mapping[str, Mapping[str, LabelArray]] = field(repr=False)
    n_classes: Mapping[str, int]


def collect_shown(catalog: Catalog, published: Published, *, storage: Path, white_box: bool = True) -> Shown:
    """The encoder's output and every released feature, with the weights for white-box attackers.

    The encoder's output comes from the feature cache, where `collect` has put it.
    """
    _, weights = catalog.encoder(published.encoder.version)
    encoder = freeze(published.network.build_encoder(seed=0))
    encoder.load_state_dict(dict(weights))
    table, splits = published.opened.table, published.opened.splits
    key = cache_key(encoder, fingerprint=table.fingerprint, image_size=table.images.shape[1])
    u = FeatureCache(storage / "features").encoder_features(
        encoder, table.images, key=key, normalisation=table.normalisation, mirrored=False
    )
    rows = {subset: splits.subset(subset) for subset in SUBSETS}

    def network(*modules: nn.Module) -> PixelNetwork | None:
        return PixelNetwork(table.normalisation, encoder, *modules) if white_box else None

    shown = {ENCODER: ShownFeature(features={s: u[r].astype(np.float32) for s, r in rows.items()}, network=network())}
    for task, given in published.features.items():
        if given.private:
            continue
        record, state, _ = catalog.load_task(published.encoder.version, task)
        module = build_module(ModuleConfig.from_json(dict(record.module_config)), seed=0)
        module.load_state_dict(dict(state))
        shown[task] = ShownFeature(features=given.features, network=network(module), task=task)
    return Shown(
        shown=shown,
        images={subset: table.images[r] for subset, r in rows.items()},
        labels=published.labels,
        n_classes={target: spec.n_outputs for target, spec in published.specs.items()},
    )
