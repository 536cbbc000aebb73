"""A small exported head, for tests of the edge client."""

from __future__ import annotations

from pathlib import Path

from orchestrator.models.heads import HeadConfig, build_head
from serve.edge.card import HeadCard
from serve.heads import export_head

CARD = HeadCard(task="smile", version="1.2-0123456789ab", feature_shape=(8, 4, 4), classes=("no", "yes", "unsure"))


MAP_CARD = HeadCard(task="drawing", version="1.2-0123456789ab", feature_shape=(8, 4, 4), answer_shape=(2, 9, 6))


def small_map_head(path: Path, card: HeadCard = MAP_CARD) -> Path:
    assert card.answer_shape is not None
    config = HeadConfig(
        kind="map",
        backbone="resnet18",
        split_index=5,
        n_outputs=card.answer_shape[0],
        feature_shape=card.feature_shape,
        answer_size=card.answer_shape[1:],
    )
    path.write_bytes(export_head(build_head(config, seed=3).eval(), card))
    return path


def small_head(path: Path, card: HeadCard = CARD) -> Path:
    config = HeadConfig(
        kind="mlp", backbone="resnet18", split_index=5, n_outputs=len(card.classes), feature_shape=card.feature_shape
    )
    path.write_bytes(export_head(build_head(config, seed=3).eval(), card))
    return path
