"""From a catalog to what attackers work on: every published task's features, by subset.

Bounded features have the noise with which they are released, under the version that was published: the very bytes that
a tenant gets, however often it asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orchestrator.assembly import TrainingData, cache_key
from orchestrator.catalog import Catalog
from orchestrator.catalog_records import EncoderRecord, TaskRecord
from orchestrator.consumer import rebuild_head
from orchestrator.evaluation.attacks.base import FloatArray, ImageArray
from orchestrator.evaluation.jobs import check_classification
from orchestrator.evaluation.leakage import TaskFeatures
from orchestrator.evaluation.row_bounds import measured_rate
from orchestrator.feature_cache import FeatureCache
from orchestrator.models.modules import ModuleConfig, rebuild_module
from orchestrator.network import BoundedNetworkConfig, NetworkConfig, freeze
from orchestrator.privacy.bounded.keyed_noise import ImageDigests, NoiseKey
from orchestrator.release import PublishedRelease, published_version
from orchestrator.runs.noise import noise_key_path
from orchestrator.runs.observer import RunObserver
from orchestrator.runs.opening import OpenData, open_data
from orchestrator.runs.publishing import network_of, settings_of
from tasks.datasets.table import ImageTable
from tasks.spec import TaskSpec

_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Published:
    """One encoder's published features, on the data that it was trained on."""

    encoder: EncoderRecord
    opened: OpenData
    network: NetworkConfig
    features: Mapping[str, TaskFeatures] = field(repr=False)
    labels: Mapping[str, Mapping[str, NDArray[np.int64]]] = field(repr=False)
    specs: Mapping[str, TaskSpec]
    records: Mapping[str, TaskRecord]
    rows: Mapping[str, NDArray[np.int64]] = field(repr=False)
    """Subset to rows of the table, in the order of features and labels."""
    u: NDArray[np.float16] = field(repr=False)
    """(N, C, H, W) of all rows of the table: what no tenant receives."""
    vectors: Mapping[str, Mapping[str, FloatArray]] = field(default_factory=dict, repr=False)
    """s of bounded tasks before the noise, by subset, (N, D) or maps (N, D, H, W): what no tenant receives either."""

    @property
    def sold(self) -> list[str]:
        """Tasks whose features somebody receives."""
        return [task for task, given in self.features.items() if not given.private]

    @property
    def sold_classes(self) -> list[str]:
        """Those that answer with a class, which is what can be right or wrong."""
        return [task for task in self.sold if not self.features[task].spec.dense]

    def network_of(self, task: str) -> NetworkConfig:
        """The networks of that task's kind."""
        channel = self.features[task].channel
        return self.network if channel is None else BoundedNetworkConfig.of(self.network, channel)

    def images(self, subsets: Sequence[str]) -> dict[str, ImageArray]:
        """The images of those subsets, in the order of features and labels."""
        return {subset: self.opened.table.images[self.rows[subset]] for subset in subsets}

    def universal(self, subsets: Sequence[str]) -> dict[str, FloatArray]:
        """u of those subsets, in the order of features and labels."""
        return {subset: self.u[self.rows[subset]].astype(np.float32) for subset in subsets}


def collect(
    catalog: Catalog,
    observer: RunObserver,
    *,
    encoder_version: str,
    data: str | None,
    targets: Sequence[str],
    storage: Path,
    threads: int | None = None,
) -> Published:
    """Load the encoder, its data and its tasks, and compute every task's features, from the feature cache.

    ``targets`` are attributes to attack beside the published tasks; none named means all of them and the private one.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    encoder, weights = catalog.encoder(encoder_version)
    records = catalog.tasks(encoder.version)
    opened = open_data(settings_of(encoder, data), observer, fingerprint=encoder.data_fingerprint)
    names = _attacked(encoder, records, targets, opened.table)
    training = opened.training_data(tuple(dict.fromkeys([*records, *names])))
    check_classification(training.specs[task] for task in names)
    network = network_of(encoder, head=None, module=None)
    net = freeze(network.build_encoder(seed=0))
    net.load_state_dict(dict(weights))
    key = cache_key(net, fingerprint=opened.table.fingerprint, image_size=training.image_size)
    u = FeatureCache(storage / "features").encoder_features(
        net, opened.table.images, key=key, normalisation=opened.table.normalisation, mirrored=False
    )
    features: dict[str, TaskFeatures] = {}
    vectors: dict[str, Mapping[str, FloatArray]] = {}
    for task, record in records.items():
        given = _features_of(catalog, encoder, task, u, training.rows, private=record.private)
        if given.channel is not None:
            secret = NoiseKey.load(noise_key_path(storage, catalog.name))
            vectors[task] = {subset: _squeezed(s) for subset, s in given.features.items()}
            rate = measured_rate(given.channel, vectors[task], training.labels[task])
            given = released_features(given, secret, version=published_version(encoder, record), images=training)
            given = dataclasses.replace(given, rate=rate)
        features[task] = given
    return Published(
        encoder=encoder,
        opened=opened,
        network=network,
        features=features,
        labels={task: training.labels[task] for task in names},
        specs={task: training.specs[task] for task in names},
        records=records,
        rows=training.rows,
        u=u,
        vectors=vectors,
    )


def released_features(given: TaskFeatures, key: NoiseKey, *, version: str, images: TrainingData) -> TaskFeatures:
    """A bounded task's features as its tenant gets them: under the noise of that version."""
    channel, task = given.channel, given.spec.name
    assert channel is not None
    release = PublishedRelease(key=key, task=task, version=version, channel=channel, fresh=False)
    found = {
        subset: release.noisy(torch.from_numpy(s), ImageDigests.of(images.images[images.rows[subset]])).numpy()
        for subset, s in given.features.items()
    }
    return dataclasses.replace(given, features=found)


def _squeezed(s: FloatArray) -> FloatArray:
    """(N, D) of (N, D, 1, 1); a map of cells stays one."""
    return s.reshape(len(s), -1) if s.shape[2:] == (1, 1) else s


def features_through(
    module: nn.Module, u: NDArray[np.float16], rows: Mapping[str, NDArray[np.int64]]
) -> dict[str, FloatArray]:
    """Subset to g(u) of its rows, (N, C, H, W) in float32."""

    def through(subset: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            parts = [
                module(torch.from_numpy(np.ascontiguousarray(u[subset[i : i + _CHUNK]])).float()).numpy()
                for i in range(0, len(subset), _CHUNK)
            ]
        return np.concatenate(parts)

    return {name: through(subset) for name, subset in rows.items()}


def _attacked(
    encoder: EncoderRecord, records: Mapping[str, TaskRecord], targets: Sequence[str], table: ImageTable
) -> list[str]:
    """Labels that attackers go for. A map is none of them: what is known of it, reconstruction measures."""
    hidden = encoder.data.get("private")
    every = [*records, *([hidden] if hidden else [])]
    asked = list(targets) or [task for task in every if not table.spec(task).dense]
    sold = [t for t, r in records.items() if not r.private and not r.spec.dense]
    return list(dict.fromkeys([*sold, *asked]))


def _features_of(
    catalog: Catalog,
    encoder: EncoderRecord,
    task: str,
    u: NDArray[np.float16],
    rows: Mapping[str, NDArray[np.int64]],
    *,
    private: bool,
) -> TaskFeatures:
    record, state, head_state = catalog.load_task(encoder.version, task)
    config = ModuleConfig.from_json(dict(record.module_config))
    head = None
    if head_state is not None and record.head_config is not None:
        head = rebuild_head(dict(record.head_config), dict(head_state))

    return TaskFeatures(
        spec=record.spec,
        private=private,
        features=features_through(freeze(rebuild_module(config, state)), u, rows),
        head=head,
        channel=config.channel,
    )
