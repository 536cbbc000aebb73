#!/usr/bin/env python3
"""Write a published head as an ONNX file for the edge client. See ``--help``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.command import main

if TYPE_CHECKING:
    from orchestrator.settings.export_head import ExportHeadSettings


def run(settings: ExportHeadSettings) -> None:
    """Read the head from the catalog, export it, compare the two, and write it."""
    from orchestrator.catalog import Catalog
    from orchestrator.checkpoint import write_atomically
    from orchestrator.consumer import rebuild_head
    from orchestrator.errors import ConfigError
    from orchestrator.tracking import check_reachable
    from pipelines.running import published_catalog
    from serve.heads import card_of, export_head
    from serve.versions import served_version

    name = published_catalog(settings.runtime, settings.data)
    check_reachable(settings.runtime.tracking)
    record, _, state = Catalog(settings.runtime.tracking, name).load_task(settings.encoder_version, settings.task)
    if record.private:
        raise ConfigError(f"{settings.task!r} is the private attribute: its classifier does not leave the producer")
    if state is None or record.head_config is None:
        raise ConfigError(
            f"the tenant of {settings.task!r} keeps its head: it has the ONNX file, from serve.edge.train"
        )
    head = rebuild_head(dict(record.head_config), state)
    card = card_of(record.spec, served_version(record), tuple(record.head_config["feature_shape"]))
    body = export_head(head, card)
    path = settings.out or settings.runtime.storage_path / "heads" / f"{settings.task}-{card.version}.onnx"
    write_atomically(path.expanduser().absolute(), body)
    print(f"{path}: the head of {settings.task!r}, version {card.version}, {len(body):,} bytes")


if __name__ == "__main__":
    main("orchestrator.settings.export_head:ExportHeadSettings", run, prog="export_head.py")
