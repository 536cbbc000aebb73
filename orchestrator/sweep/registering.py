"""The best trials of a sweep, published: an encoder with its tasks, under an alias that says what it is best in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.assembly import TrainingData
from orchestrator.catalog import Catalog
from orchestrator.catalog_records import EncoderRecord, TaskEntry
from orchestrator.mlflow_store import open_client, store_errors
from orchestrator.models.modules import ModuleConfig
from orchestrator.privacy.guarantee import Guarantee
from orchestrator.runs.noise import noise_plan
from orchestrator.runs.publishing import task_entry, task_privacy_words, with_bound
from orchestrator.settings.train import TrainSettings
from orchestrator.shaping import Secret
from orchestrator.sweep.encoders import RECIPE, Encoders
from orchestrator.sweep.recipe import Need
from orchestrator.sweep.records import Trial, weights_file
from orchestrator.sweep.result import Result
from orchestrator.sweep.settings import SweepSettings
from orchestrator.sweep.store import Store
from orchestrator.sweep.trial import KIND_OF_WEIGHTS
from orchestrator.wire import HeadWeights


def winners(result: Result) -> dict[str, Trial]:
    """Objective to the trial that is published for it: the best configuration's first seed."""
    found = {objective.name: result.best(objective) for objective in result.objectives}
    return {name: best.trials[0] for name, best in found.items() if best is not None}


@dataclass(frozen=True, kw_only=True)
class Registrar:
    """Publishes the best trials of a sweep."""

    settings: SweepSettings
    data: TrainingData
    encoders: Encoders
    store: Store
    catalog: Catalog
    run_id: str
    secrets: Mapping[str, Secret]

    def register(self, result: Result) -> dict[str, str]:
        """Publish the best trial of each objective. Returns objective to encoder version.

        A published task never changes and an encoder has each task once, so each winner gets a version of the encoder
        of its own: the same weights, and a statement that says what it was chosen from.
        """
        versions: dict[str, str] = {}
        aliases: dict[str, str] = {}
        for objective, trial in winners(result).items():
            if trial.id not in versions:
                versions[trial.id] = self._publish(trial, result)
            aliases[objective] = versions[trial.id]
        client = open_client(self.catalog.uri)
        with store_errors(self.catalog.uri):
            for objective, version in aliases.items():
                client.set_registered_model_alias(f"{self.catalog.name}.encoder", f"best-{objective}", version)
        return aliases

    def _publish(self, trial: Trial, result: Result) -> str:
        settings, catalog = self.settings, self.catalog
        training = settings.training_of(trial.point)
        network = training.task_privacy.network(training.network)
        # From here on the key is there.
        noise_plan(network, catalog, storage=settings.runtime.local.storage_path, run=result.run)
        state = self.store.read_state(weights_file(trial.id), kind=KIND_OF_WEIGHTS)
        shared, weights = catalog.encoder(self.encoders.versions[Need.of(trial.point)])
        guarantee = dataclasses.replace(
            Guarantee.from_json(dict(shared.guarantee)), chosen_from=len([t for t in result.trials if t.values])
        )
        record = catalog.publish_encoder(_chosen(shared, guarantee, self.run_id), weights)
        module_config = network.module_config(self.data.image_size)
        entries = [self._entry(trial, training, module_config, guarantee, task, kept) for task, kept in state.items()]
        if settings.private not in state:
            entries.insert(0, _earlier(catalog, shared, str(settings.private), guarantee))
        catalog.publish_tasks(record.version, entries, expected=frozenset(), run_id=self.run_id)
        return record.version

    def _entry(
        self,
        trial: Trial,
        training: TrainSettings,
        module_config: ModuleConfig,
        guarantee: Guarantee,
        task: str,
        kept: Mapping[str, Any],
    ) -> TaskEntry:
        dissimilarity = training.task_privacy.dissimilarity
        return task_entry(
            self.data.specs[task],
            private=task == self.settings.private,
            module_config=module_config,
            module_state=kept["module"],
            head=HeadWeights(task=task, state=kept["head"], config=json.loads(kept["head_config"])),
            metrics=trial.test.get(task, {}),
            guarantee=with_bound(
                dataclasses.replace(guarantee, task_privacy=task_privacy_words(dissimilarity)),
                module_config,
                epochs=int(kept["epochs"]),
                noise_kind=training.task_privacy.feature_noise_kind,
                shaping=training.task_privacy.shaping(self.secrets),
            ),
            dissimilarity=dissimilarity,
        )


def _chosen(shared: EncoderRecord, guarantee: Guarantee, run_id: str) -> EncoderRecord:
    """The encoder's record again, and no longer one that a further sweep would take for the shared one."""
    data: Mapping[str, Any] = {name: value for name, value in shared.data.items() if name != RECIPE}
    return dataclasses.replace(
        shared, data={**data, "copy_of_encoder": shared.version}, guarantee=guarantee.to_json(), run_id=run_id
    )


def _earlier(catalog: Catalog, shared: EncoderRecord, private: str, guarantee: Guarantee) -> TaskEntry:
    """The private attribute's module of phase 1, which belongs to the encoder."""
    record, module, head = catalog.load_task(shared.version, private)
    return TaskEntry(
        spec=record.spec,
        private=True,
        module_config=record.module_config,
        module_state=module,
        head_config=record.head_config,
        head_state=None if head is None else {name: torch.as_tensor(value) for name, value in head.items()},
        metrics=record.metrics,
        guarantee=guarantee.to_json(),
        dissimilarity=record.dissimilarity,
    )
