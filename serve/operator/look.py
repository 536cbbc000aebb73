"""One image through everything that is served: maps, answers, and what decoders make of each feature.

Networks are loaded, and decoders trained, when somebody first looks. Nothing is released: no stream is written, nothing
is charged, and an image that is brought is forgotten with the answer.

Axes: C channels, H and W of a feature, S pixels a side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from orchestrator.catalog_records import EncoderRecord
from orchestrator.errors import DataError, NonFiniteFeatureError
from orchestrator.evaluation.figures.pictures import may_draw
from orchestrator.privacy.bounded.keyed_noise import ImageDigests
from serve.arguments import TaskArgs
from serve.leakage import reconstructed
from serve.operator.decoders import Decoders, FailedDecoder, ReadyDecoder
from serve.operator.exhibits import EncoderKey, Exhibit, Gallery, LoadedEncoder, encoder_key
from serve.operator.pictures import chosen_maps, image_png, maps_png
from serve.operator.samples import Samples
from serve.operator.views import Answer, FeatureView, Look, Reconstruction, Swap, Unreadable
from tasks.datasets.decoding import decode_image
from tasks.datasets.table import ImageArray

Feature = NDArray[np.float32]

ENCODER: Final = "encoder"
"""What an evaluation calls the encoder's own output."""
_UNIVERSAL: Final = ""
"""Stands for it among tasks: no task has that name."""
FORBIDDEN: Final = (
    "Pictures of what this encoder was trained on may show people, so they are not drawn; "
    "deploy.py up --pictures allows it."
)
_WAITING: Final = "A decoder is being trained; this takes up to a few minutes after the first look."


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """The image that is looked at."""

    title: str
    pixels: Callable[[int], ImageArray] = field(repr=False)
    """Side to (S, S, 3). Raises `DataError`."""
    row: int | None
    """Of a digit; None of an image that was brought."""


class Looker:
    """Loads what is served and looks at it. Many threads may use it; they look one at a time."""

    def __init__(self, samples: Samples, *, pictures: bool, max_pixels: int) -> None:
        """``pictures`` allows those that may show people."""
        self._samples, self._pictures, self._max_pixels = samples, pictures, max_pixels
        self._gallery = Gallery()
        self._decoders: dict[EncoderKey, Decoders] = {}
        self._lock = threading.Lock()

    def may_draw(self, encoder: EncoderRecord) -> bool:
        """Whether pictures that look like this encoder's data may be drawn."""
        return may_draw(str(encoder.data["name"]), allow_people=self._pictures)

    def wait(self, timeout_s: float = 600.0) -> None:
        """Until every decoder that is being trained is trained, or time is up."""
        for decoders in list(self._decoders.values()):
            decoders.wait(timeout_s)

    def look(self, served: Mapping[str, TaskArgs], *, sample: int, image: bytes | None) -> Look | Unreadable:
        """See `serve.operator.views.Viewer.look`."""
        with self._lock:
            exhibits, encoders, faults = self._gallery.open(served)
            if not exhibits:
                return Unreadable(faults[0] if faults else "nothing is served yet")
            self._train(exhibits, encoders)
            try:
                subject = self._subject(sample, image, [encoder.record for encoder in encoders.values()])
                return self._looked(subject, served, exhibits, encoders, faults)
            except (DataError, NonFiniteFeatureError) as error:
                return Unreadable(str(error))

    def _looked(
        self,
        subject: _Subject,
        served: Mapping[str, TaskArgs],
        exhibits: Sequence[Exhibit],
        encoders: Mapping[EncoderKey, LoadedEncoder],
        faults: Sequence[str],
    ) -> Look:
        pixels = {key: subject.pixels(encoder.record.image_size) for key, encoder in encoders.items()}
        u = {key: encoder.model.encode(pixels[key][None]) for key, encoder in encoders.items()}
        z = [e.module.features(u[e.encoder], ImageDigests.of(pixels[e.encoder][None]))[0] for e in exhibits]
        drawn = {key: subject.row is not None or self.may_draw(e.record) for key, e in encoders.items()}
        evaluations = {
            encoder_key(args.source, version): version.evaluation
            for args in served.values()
            for version in args.versions()
        }
        largest = max(pixels.values(), key=len)
        return Look(
            title=subject.title,
            picture=image_png(largest) if all(drawn.values()) else None,
            features=tuple(
                FeatureView(
                    name=exhibit.name,
                    maps=maps_png(feature[chosen_maps(feature)]) if drawn[exhibit.encoder] else None,
                    text=_shape(feature, bits=exhibit.module.card.bits_per_feature),
                    reconstruction=self._reconstruction(
                        exhibit.encoder, exhibit.spec.name, feature, evaluations[exhibit.encoder]
                    ),
                )
                for exhibit, feature in zip(exhibits, z, strict=True)
            ),
            encoders=tuple(
                FeatureView(
                    name=f"Encoder {key[2]}" if len(encoders) > 1 else "The encoder's own output",
                    maps=maps_png(feature[chosen_maps(feature)]) if drawn[key] else None,
                    text=_shape(feature, bits=None),
                    reconstruction=self._reconstruction(key, _UNIVERSAL, feature, evaluations[key]),
                )
                for key, feature in ((key, u[key][0].astype(np.float32)) for key in encoders)
            ),
            swap=self._swap(exhibits, z, subject.row),
            withheld="" if all(drawn.values()) else FORBIDDEN,
            faults=tuple(faults),
        )

    def _subject(self, sample: int, image: bytes | None, encoders: Sequence[EncoderRecord]) -> _Subject:
        if image is not None:
            given = image
            return _Subject(
                title="The image that you brought",
                pixels=lambda size: decode_image(given, size, max_pixels=self._max_pixels),
                row=None,
            )
        rows = self._samples.rows(encoders)
        if not len(rows):
            raise DataError("every digit is among the training images of an encoder that is served: bring an image")
        place = (sample - 1) % len(rows)
        row = int(rows[place])
        return _Subject(
            title=f"Digit {place + 1} of {len(rows)} that no encoder here learned from: a {self._samples.digit(row)}",
            pixels=lambda size: self._samples.image(row, size),
            row=row,
        )

    # -- decoders ------------------------------------------------------------------------------------------------------

    def _train(self, exhibits: Sequence[Exhibit], encoders: Mapping[EncoderKey, LoadedEncoder]) -> None:
        """Begin to train what is not trained yet; forget what is served no more."""
        self._decoders = {key: found for key, found in self._decoders.items() if key in encoders}
        for key, encoder in encoders.items():
            if not self.may_draw(encoder.record):
                continue
            modules = {exhibit.spec.name: exhibit.module.features for exhibit in exhibits if exhibit.encoder == key}
            features = {_UNIVERSAL: lambda u, _: u.astype(np.float32), **modules}
            known = self._decoders.get(key)
            if known is None or known.names != features.keys():
                self._decoders[key] = Decoders(encoder.record, encoder.model, features, known=known)
                self._decoders[key].start()

    def _reconstruction(self, key: EncoderKey, task: str, z_CHW: Feature, evaluation: str | None) -> Reconstruction:
        """``task`` is `_UNIVERSAL` for the encoder's own output."""
        decoders = self._decoders.get(key)
        if decoders is None:
            return Reconstruction(state="none", text=FORBIDDEN)
        match decoders.of(task):
            case ReadyDecoder() as ready:
                (image,) = ready.decode(z_CHW[None])
                pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
                text = " ".join(filter(None, [ready.text, _evaluated(evaluation, task or ENCODER)]))
                return Reconstruction(picture=image_png(pixels), state="ready", text=text)
            case FailedDecoder(reason):
                return Reconstruction(state="none", text=f"There is no reconstruction: {reason}")
            case _:
                return Reconstruction(state="waiting", text=_WAITING)

    # -- heads ---------------------------------------------------------------------------------------------------------

    def _swap(self, exhibits: Sequence[Exhibit], z: Sequence[Feature], row: int | None) -> Swap:
        heads = [exhibit for exhibit in exhibits if exhibit.head is not None]
        truths = {head.name: None if row is None else self._samples.truth(row, head.spec) for head in heads}

        def answer(head: Exhibit, feature: Feature, owner: Exhibit) -> Answer | None:
            found = head.answer(feature)
            if found is None:
                return None
            best, truth = int(found.argmax()), truths[head.name]
            label = head.spec.classes[best]
            return Answer(
                label=label,
                share=float(found[best]),
                own=head.name == owner.name,
                right=None if truth is None else label == truth,
            )

        return Swap(
            heads=tuple(head.name for head in heads),
            truths=tuple(truths[head.name] for head in heads),
            rows=tuple(
                (owner.name, tuple(answer(head, feature, owner) for head in heads))
                for owner, feature in zip(exhibits, z, strict=True)
            ),
            missing=tuple(exhibit.name for exhibit in exhibits if exhibit.head is None),
        )


def _shape(z_CHW: Feature, *, bits: float | None) -> str:
    channels, height, width = z_CHW.shape
    bounded = "" if bits is None else f", of at most {bits:.2f} bits"
    if height * width == 1:
        return f"{channels} numbers{bounded}, each a square."
    shown = len(chosen_maps(z_CHW))
    which = "all of them" if shown == channels else f"{shown} of them, those that vary most over this image"
    return f"{channels} maps of {height} x {width}{bounded}; drawn: {which}."


def _evaluated(evaluation: str | None, feature: str) -> str:
    """The best attacker of the evaluation, for comparison."""
    try:
        found = None if evaluation is None else reconstructed(Path(evaluation), feature)
    except DataError:
        return ""
    if found is None:
        return "No evaluation has tried to get images back from it."
    return f"The best attacker of the evaluation ({found.attack}, budget {found.budget}) reached SSIM {found.ssim:.2f}."
