#!/usr/bin/env python3
"""Sealed labels: sealed to a tenant, released at a set time, opened by it alone. See ``--help``."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelines.command import main

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.wire import SealedLabels
    from serve.tenants.custodian import Custodian
    from serve.tenants.label_settings import (
        CustodyPlace,
        LabelsErase,
        LabelsKey,
        LabelsList,
        LabelsOpen,
        LabelsRelease,
        LabelsSeal,
        LabelsSettings,
    )


def run(settings: LabelsSettings) -> None:
    """Do what was asked, and say what was done."""
    from serve.tenants.label_settings import LabelsErase, LabelsKey, LabelsList, LabelsOpen, LabelsRelease, LabelsSeal

    match settings.command:
        case LabelsKey() as command:
            _key(command)
        case LabelsSeal() as command:
            _seal(command)
        case LabelsRelease() as command:
            _release(command)
        case LabelsOpen() as command:
            _open(command)
        case LabelsErase() as command:
            _erase(command)
        case LabelsList() as command:
            _list(command)


def _key(command: LabelsKey) -> None:
    from serve.tenant_key import read_tenant_key

    print(read_tenant_key(command.key_file.expanduser(), make=True).public_key("").raw.hex())


def _seal(command: LabelsSeal) -> None:
    from orchestrator.errors import DataError
    from serve.private_files import private_file
    from serve.tenants.moments import moment, shown
    from serve.tenants.sealed_files import to_bytes

    held = command.held
    _check_known(command)
    sealed = _sealed(command)
    out = command.out.expanduser().absolute()
    now = time.time()
    not_before = moment(command.not_before, now=now)
    with private_file(out, what="the sealed labels") as file, _custodian(command) as custodian:
        early = custodian.deposit(held.tenant, sealed, not_before=not_before, now=now)
        try:
            file.write(to_bytes(early))
        except DataError as error:
            custodian.erase(held.tenant, held.task, held.subset)
            error.add_note("Nothing is held of them any more: seal them again")
            raise
    print(f"wrote the sealed {held.subset} labels of {held.task} for {held.tenant} to {out}")
    print(f"what opens them is held until {shown(not_before)}")


def _release(command: LabelsRelease) -> None:
    from serve.private_files import private_file

    held = command.held
    out = command.out.expanduser().absolute()
    with _custodian(command) as custodian, private_file(out, what="what opens the labels") as file:
        file.write(custodian.release(held.tenant, held.task, held.subset, time.time()))
    print(f"wrote what opens the {held.subset} labels of {held.task} to {out}; only {held.tenant} can use it")


def _open(command: LabelsOpen) -> None:
    from dataclasses import replace

    import numpy as np

    from orchestrator.privacy.escrow import open_labels
    from serve.private_files import read_private, write_private
    from serve.tenant_key import read_tenant_key
    from serve.tenants.sealed_files import read_sealed

    sealed = read_sealed(command.sealed.expanduser())
    key = read_tenant_key(command.key_file.expanduser())
    wrapped = read_private(command.released.expanduser(), what="what opens the labels")
    labels = open_labels(replace(sealed, wrapped_key=wrapped), key, task=sealed.task, subset=sealed.subset)
    buffer = io.BytesIO()
    np.save(buffer, labels, allow_pickle=False)
    out = command.out.expanduser().absolute()
    write_private(out, buffer.getvalue(), what="the labels")
    print(f"wrote {len(labels)} {sealed.subset} labels of {sealed.task} to {out}")


def _erase(command: LabelsErase) -> None:
    from serve.tenants.moments import shown

    held = command.held
    with _custodian(command) as custodian:
        entry = custodian.erase(held.tenant, held.task, held.subset)
    if entry.released is None:
        print(f"erased: nobody can read the {held.subset} labels of {held.task} that were sealed to {held.tenant}")
    else:
        print(f"erased; {held.tenant} may have what was released at {shown(entry.released)}")


def _list(command: LabelsList) -> None:
    from serve.tenants.moments import shown

    with _custodian(command) as custodian:
        held = custodian.held()
    for entry in held:
        state = "not released" if entry.released is None else f"released {shown(entry.released)}"
        print(f"{entry.tenant}  {entry.task}  {entry.subset}  not before {shown(entry.not_before)}  {state}")
    if not held:
        print("no labels are held")


@contextmanager
def _custodian(place: CustodyPlace) -> Iterator[Custodian]:
    from serve.tenants.audit import AuditLog
    from serve.tenants.custodian import Custodian

    _check_registry(place.places.registry)
    with AuditLog(place.places.audit) as log:
        yield Custodian(place.places.custody, place.key_path, log)


def _check_registry(path: Path) -> None:
    from orchestrator.errors import ConfigError

    if not path.exists():
        raise ConfigError(f"there is no registry at {path}: begin one with `tenants.py add`")


def _check_known(command: LabelsSeal) -> None:
    """Labels are sealed to nobody who was not granted the task."""
    from orchestrator.errors import UnknownNameError
    from serve.tenants.registry import Registry

    _check_registry(command.places.registry)
    with Registry(command.places.registry) as registry:
        granted = [grant.task for grant in registry.tenant(command.held.tenant).grants if "train" in grant.verbs]
    if command.held.task not in granted:
        raise UnknownNameError(f"task that {command.held.tenant!r} may train", command.held.task, granted)


def _sealed(command: LabelsSeal) -> SealedLabels:
    """As a session would seal them: in the order of the subset's example ids."""
    from orchestrator.privacy.escrow import seal_labels
    from orchestrator.runs.observer import SilentObserver
    from orchestrator.runs.opening import open_data
    from orchestrator.wire import PublicKey
    from serve.tenants.sealed_files import parse_public_key

    task, subset = command.held.task, command.held.subset
    data = open_data(command.data, SilentObserver()).training_data((task,))
    return seal_labels(
        data.labels[task][subset],
        task=task,
        subset=subset,
        key=PublicKey(task=task, raw=parse_public_key(command.public_key)),
        n_classes=data.specs[task].n_outputs,
    )


if __name__ == "__main__":
    main("serve.tenants.label_settings:LabelsSettings", run, prog="labels.py")
