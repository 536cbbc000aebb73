"""From a catalog to what attackers who want images back work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.catalog import Catalog
from orchestrator.evaluation.attacks.base import LabelArray
from orchestrator.evaluation.attacks.swap import head_logits
from orchestrator.evaluation.collect import Published
from orchestrator.evaluation.reconstruction.base import PixelNetwork
from orchestrator.evaluation.reconstruction.suite import ShownFeature
from orchestrator.models.modules import ModuleConfig, rebuild_module
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


def collect_shown(
    catalog: Catalog, published: Published, *, subsets: Sequence[str] = SUBSETS, white_box: bool = True
) -> Shown:
    """The encoder's output and every released feature of these subsets, with the weights for white-box attackers."""
    networks = _networks(catalog, published) if white_box else {}
    shown = {ENCODER: ShownFeature(features=published.universal(subsets), network=networks.get(ENCODER))}
    for task in published.sold:
        given = published.features[task]
        z = {subset: given.features[subset] for subset in subsets}
        answers = None
        if given.head is not None and not given.spec.dense:
            answers = {subset: head_logits(given.head, z[subset]).argmax(axis=1) for subset in subsets}
        shown[task] = ShownFeature(features=z, network=networks.get(task), task=task, answers=answers)
    return Shown(
        shown=shown,
        images=published.images(subsets),
        labels=published.labels,
        n_classes={target: spec.n_outputs for target, spec in published.specs.items()},
    )


def _networks(catalog: Catalog, published: Published) -> dict[str, PixelNetwork]:
    """From pixels to the encoder's output, and to each feature that is sold."""
    version, normalisation = published.encoder.version, published.opened.table.normalisation
    _, weights = catalog.encoder(version)
    encoder = freeze(published.network.build_encoder(seed=0))
    encoder.load_state_dict(dict(weights))
    networks = {ENCODER: PixelNetwork(normalisation, encoder)}
    for task in published.sold:
        record, state, _ = catalog.load_task(version, task)
        module = rebuild_module(ModuleConfig.from_json(dict(record.module_config)), state)
        networks[task] = PixelNetwork(normalisation, encoder, module)
    return networks
