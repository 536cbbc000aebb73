"""Between a run and the catalog: what is written about an encoder and a task, and how it is read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from orchestrator.assembly import SessionPlan, TrainingData
from orchestrator.catalog import Catalog
from orchestrator.catalog_records import EncoderRecord, TaskEntry, TaskRecord
from orchestrator.config import from_mapping, to_mapping
from orchestrator.encoder_training import EncoderResult
from orchestrator.errors import AlreadyPublishedError, ConfigError
from orchestrator.models.modules import ModuleConfig
from orchestrator.network import NetworkConfig
from orchestrator.privacy.dissimilarity import DissimilarityConfig
from orchestrator.privacy.guarantee import Guarantee
from orchestrator.settings.shared import DataSettings
from orchestrator.shaping import ShapingPlan
from orchestrator.wire import HeadWeights
from tasks.datasets.table import ImageTable
from tasks.spec import TaskSpec


def encoder_record(
    *,
    settings: DataSettings,
    private: str | None,
    table: ImageTable,
    network: NetworkConfig,
    guarantee: Guarantee,
    run_id: str,
) -> EncoderRecord:
    """What the catalog says about an encoder: enough to build it and to find the same split of the same data again."""
    return EncoderRecord(
        version="",
        backbone=network.backbone,
        split_index=network.split_index,
        image_size=settings.image_size,
        feature_shape=network.shape(settings.image_size),
        data_fingerprint=table.fingerprint,
        normalisation={"mean": list(table.normalisation.mean), "std": list(table.normalisation.std)},
        flip=table.flip,
        data={
            "settings": to_mapping(settings),
            "private": private,
            "head": network.head,
            "module": network.module,
            "name": table.name,
        },
        guarantee=guarantee.to_json(),
        weights_sha256="",
        run_id=run_id,
        created="",
    )


def settings_of(encoder: EncoderRecord, data: str | None) -> DataSettings:
    """The data settings that the encoder was trained with; ``data`` says where the same content is now."""
    settings = from_mapping(DataSettings, encoder.data["settings"], where=f"encoder {encoder.version}")
    return settings if data is None else dataclasses.replace(settings, data=data)


def network_of(encoder: EncoderRecord, *, head: str | None, module: str | None) -> NetworkConfig:
    """The networks behind that encoder."""
    return NetworkConfig(
        backbone=encoder.backbone,
        split_index=encoder.split_index,
        head=head or encoder.data["head"],
        module=module or encoder.data["module"],
    )


def guarantee_of(encoder: EncoderRecord, *, task_privacy: DissimilarityConfig) -> Guarantee:
    """The encoder's guarantee, with what is said of a task that is added to it."""
    return dataclasses.replace(
        Guarantee.from_json(dict(encoder.guarantee)), task_privacy=task_privacy_words(task_privacy)
    )


def with_bound(
    guarantee: Guarantee, module_config: ModuleConfig, *, epochs: int, noise_kind: str, shaping: ShapingPlan
) -> Guarantee:
    """The guarantee of a task after so many epochs of a session: with the bound on its feature, if there is one."""
    channel = module_config.channel
    if channel is None:
        return guarantee
    words = "; ".join(part for part in (guarantee.task_privacy, shaping.words) if part)
    return dataclasses.replace(guarantee, channel=channel, epochs=epochs, noise_kind=noise_kind, task_privacy=words)


def promised_by(records: Sequence[TaskRecord], *, else_by: Guarantee) -> Guarantee:
    """What a run says at its end: the promise of the tasks that it published, and the encoder's where it has none."""
    return Guarantee.from_json(dict(records[-1].guarantee)) if records else else_by


def notes_on_bounded(plan: SessionPlan) -> list[str]:
    """What a user is to know of a session of bounded features before it begins; nothing for others."""
    channel = plan.channel
    if channel is None:
        return []
    cells = "" if channel.cells == 1 else f"{channel.cells} cells of {channel.bits_per_cell:.3g} bits, each "
    told = [
        f"features of at most {channel.bits_per_image:.2f} bits an image: {cells}{channel.dimensions} numbers under "
        f"noise {channel.noise:.3g}"
    ]
    classified = any(not spec.dense for spec in plan.data.specs.values())
    if plan.network.tenant_head != plan.network.head and classified:
        told.append(f"the heads are {plan.network.tenant_head}: the rest of the backbone takes no such feature")
    left_out = sorted(set(plan.fixed_modules) - set(plan.kept_apart_from))
    if left_out and plan.dissimilarity.omega > 0:
        told.append(f"not kept apart from {', '.join(left_out)}, whose features have another shape")
    return told


def task_privacy_words(config: DissimilarityConfig) -> str:
    """What keeps a task's feature apart from the others', in words."""
    if config.omega == 0:
        return ""
    return f"{config.similarity} dissimilarity, {config.similarity_mode}, omega {config.omega:g}"


def fixed_modules(
    catalog: Catalog, encoder: EncoderRecord, published: Mapping[str, TaskRecord]
) -> dict[str, tuple[ModuleConfig, Mapping[str, Tensor]]]:
    """The modules of the tasks that are already there: a new one is kept apart from them, and they never change."""
    fixed: dict[str, tuple[ModuleConfig, Mapping[str, Tensor]]] = {}
    for task in sorted(published):
        record, state, _ = catalog.load_task(encoder.version, task)
        fixed[task] = (ModuleConfig.from_json(dict(record.module_config)), state)
    return fixed


def check_unpublished(
    encoder: EncoderRecord,
    published: Mapping[str, TaskRecord],
    tasks: tuple[str, ...],
    *,
    private: tuple[str, ...] = (),
) -> None:
    """Raise if one of the tasks is there already, or is what the encoder's producer hides."""
    hidden = encoder.data.get("private")
    for task in tasks:
        if task == hidden and task not in private:
            raise ConfigError(
                f"{task!r} is the private attribute of encoder {encoder.version}: it is hidden, and cannot be sold"
            )
        if task in published:
            raise AlreadyPublishedError(task, encoder.version)


def task_entry(
    spec: TaskSpec,
    *,
    private: bool,
    module_config: ModuleConfig,
    module_state: Mapping[str, Tensor],
    head: HeadWeights | None,
    metrics: Mapping[str, float],
    guarantee: Guarantee,
    dissimilarity: DissimilarityConfig,
) -> TaskEntry:
    """What a run hands to the catalog for one task; without a head where the tenant keeps it."""
    return TaskEntry(
        spec=spec,
        private=private,
        module_config=module_config.to_json(),
        module_state=module_state,
        head_config=head.config if head else None,
        head_state={name: torch.tensor(np.asarray(value)) for name, value in head.state.items()} if head else None,
        metrics=metrics,
        guarantee=guarantee.to_json(),
        dissimilarity=to_mapping(dissimilarity),
    )


def entry_of_phase_one(
    data: TrainingData, task: str, network: NetworkConfig, result: EncoderResult, *, private: bool, guarantee: Guarantee
) -> TaskEntry:
    """A task whose module and head were trained with the encoder; nothing was kept apart then."""
    spec = data.specs[task]
    return task_entry(
        spec,
        private=private,
        module_config=network.module_config(data.image_size),
        module_state=result.modules[task],
        head=HeadWeights(
            task=task,
            state={name: value.numpy() for name, value in result.heads[task].items()},
            config=network.head_config(data.image_size, spec.n_outputs).to_json(),
        ),
        metrics=result.test_metrics[task],
        guarantee=guarantee,
        dissimilarity=DissimilarityConfig(omega=0.0),
    )
