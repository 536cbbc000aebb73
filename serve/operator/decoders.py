"""Decoders that try to get the image back from a feature, trained when somebody first looks.

The evaluation keeps numbers and pictures of its decoders, not the decoders. These are of its quick kind
(`orchestrator.evaluation.reconstruction.budget`): they learn from the images that the attackers' subset holds, and are
measured on test images. A stronger attacker may get more back.

    waiting -> ready, or failed

One daemon thread per encoder trains one decoder after the other; the process may end at any moment.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from orchestrator.catalog_records import EncoderRecord
from orchestrator.errors import MetaMorphosisError
from orchestrator.evaluation.reconstruction.base import ReconstructionInput, pixels
from orchestrator.evaluation.reconstruction.baselines import mean_image
from orchestrator.evaluation.reconstruction.budget import RECONSTRUCTION_BUDGETS
from orchestrator.evaluation.reconstruction.metrics import Scores, compare
from orchestrator.evaluation.reconstruction.trained import FittedDecoder, TrainedDecoder
from orchestrator.privacy.bounded.keyed_noise import ImageDigests
from orchestrator.runs.observer import SilentObserver
from orchestrator.runs.opening import open_data
from orchestrator.runs.publishing import settings_of
from orchestrator.sampling import derive_seed
from serve.model import EncoderFeatures, EncoderModel
from tasks.datasets.table import ImageArray

logger = logging.getLogger(__name__)

Released = Callable[[EncoderFeatures, ImageDigests], NDArray[np.float32]]
"""u to what a tenant would get of it, for images with these digests."""

_BUDGET: Final = RECONSTRUCTION_BUDGETS["quick"]
_CHUNK: Final = 64
_SEED: Final = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyDecoder:
    """A decoder, and what it is worth."""

    decode: FittedDecoder = field(repr=False)
    scores: Scores
    """On test images."""
    mean_image: Scores
    """Of the mean image on the same: what needs no feature."""
    learned_from: int
    """Images."""
    seconds: float

    @property
    def text(self) -> str:
        """For people."""
        return (
            f"By a decoder that learned from {self.learned_from:,} other images in {self.seconds:.0f} s. "
            f"On {self.scores.n:,} test images it reaches SSIM {self.scores.ssim:.2f} and {self.scores.psnr:.1f} dB; "
            f"the mean image, which needs no feature, {self.mean_image.ssim:.2f} and {self.mean_image.psnr:.1f} dB."
        )


@dataclass(frozen=True, slots=True)
class FailedDecoder:
    """Why there is none."""

    text: str


class Decoders:
    """Of one encoder's features. Many threads may ask; training begins with `start`."""

    def __init__(
        self,
        record: EncoderRecord,
        encoder: EncoderModel,
        features: Mapping[str, Released],
        *,
        known: Decoders | None = None,
    ) -> None:
        """``known``: of the same encoder, whose decoders are not trained again."""
        self._record, self._encoder = record, encoder
        self._features = dict(features)
        self._found: dict[str, ReadyDecoder | FailedDecoder] = {}
        if known is not None:
            self._found |= {name: found for name, found in known._found.items() if name in features}
        self._thread = threading.Thread(target=self._train_all, name="decoders", daemon=True)

    @property
    def names(self) -> frozenset[str]:
        """Of the features."""
        return frozenset(self._features)

    def start(self) -> None:
        """Begin to train."""
        self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Until all are trained, or time is up."""
        self._thread.join(timeout_s)

    def of(self, name: str) -> ReadyDecoder | FailedDecoder | None:
        """None: it is still waited for."""
        return self._found.get(name)

    def _train_all(self) -> None:
        try:
            ground = _Ground.of(self._record, self._encoder)
        except Exception as error:
            self._found = {**dict.fromkeys(self._features, FailedDecoder(_reason(error))), **self._found}
            return
        for name in [name for name in self._features if name not in self._found]:
            try:
                self._found[name] = _trained(ground, self._features[name])
            except Exception as error:
                self._found[name] = FailedDecoder(_reason(error))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ground:
    """Images with the encoder's output, by part: learned, held_out, test."""

    images: Mapping[str, ImageArray] = field(repr=False)
    u: Mapping[str, EncoderFeatures] = field(repr=False)

    @classmethod
    def of(cls, record: EncoderRecord, encoder: EncoderModel) -> _Ground:
        """Raises `DataError` where the data set is not what the encoder was trained on, or not there."""
        opened = open_data(settings_of(record, None), SilentObserver(), fingerprint=record.data_fingerprint)
        attacker, test = opened.splits.subset("attacker"), opened.splits.subset("test")
        rows = _BUDGET.cut({"attacker": len(attacker)}, _SEED)
        drawn = np.random.default_rng(derive_seed(_SEED, "rows", "test")).permutation(len(test))[: _BUDGET.max_test]
        parts = {
            "learned": attacker[rows.learned["attacker"]],
            "held_out": attacker[rows.held_out],
            "test": test[drawn],
        }
        images = {name: opened.table.images[part] for name, part in parts.items()}
        return cls(images=images, u={name: _encoded(encoder, given) for name, given in images.items()})


def _encoded(encoder: EncoderModel, images: ImageArray) -> EncoderFeatures:
    parts = [encoder.encode(images[i : i + _CHUNK]) for i in range(0, len(images), _CHUNK)]
    return np.concatenate(parts)


def _trained(ground: _Ground, released: Released) -> ReadyDecoder:
    started = time.perf_counter()
    z = {name: released(ground.u[name], ImageDigests.of(images)) for name, images in ground.images.items()}
    data = ReconstructionInput(
        train_z=z["learned"],
        train_x=ground.images["learned"],
        validation_z=z["held_out"],
        validation_x=ground.images["held_out"],
        test_z=z["test"],
        test_x=ground.images["test"],
        seed=_SEED,
    )
    decoder = next(attack for attack in _BUDGET.attacks if isinstance(attack, TrainedDecoder)).fit(data)
    originals = pixels(data.test_x)
    return ReadyDecoder(
        decode=decoder,
        scores=compare(decoder(data.test_z), originals),
        mean_image=compare(mean_image(data, len(originals)), originals),
        learned_from=len(data.train_x),
        seconds=time.perf_counter() - started,
    )


def _reason(error: Exception) -> str:
    """What may be told. What nobody foresaw is in the log."""
    if isinstance(error, MetaMorphosisError):
        return str(error)
    logger.error("a decoder could not be trained", exc_info=error)
    return "the training failed; the log of the viewer's replica says why"
