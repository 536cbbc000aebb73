"""What goes between a producer's session and a tenant's process: a work, and its answer. Safetensors, no pickles.

A work has a number within its *sitting*, which begins with ``begin`` and ends when the producer begins another: after a
restart of either side, for a further training, or for ``end``, which is a sitting of its own. Everything that a work or
an answer carries is one of the types of `orchestrator.wire`; what has no type there cannot be said here.

kind        carries                     is answered with
begin       TaskOffer, ConsumerConfig   PublicKey
labels      SealedLabels                -
learn       FeatureBatch                FeatureGradient
evaluate    part of a FeatureBatch      -, and EvaluationReport after the last part
keep        -                           how many steps the state has that the tenant keeps for itself
restore     a number of steps           -
end         what became of the task,    -
            and of which training

Axes: B examples; the feature's own axes follow.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from orchestrator.consumer import ConsumerConfig
from orchestrator.errors import NonFiniteLossError, ProtocolError
from orchestrator.optimisation import OptimiserConfig
from orchestrator.wire import (
    EvaluationReport,
    FeatureBatch,
    FeatureContract,
    FeatureGradient,
    PublicKey,
    SealedLabels,
    TaskOffer,
)
from serve.codec import CodecError, Precision, decode, encode
from tasks.spec import TaskSpec

Kind = Literal["begin", "labels", "learn", "evaluate", "keep", "restore", "end"]
Array = NDArray[Any]

PROTOCOL: Final = 3
"""Of these messages. Both sides refuse any other."""
ENVELOPE_BYTES: Final = 64 * 1024
"""What a message may have beside its tensors."""
HELLO: Final = -1
"""Number of an answer that answers nothing: a process says that it is there."""
_FIELD: Final = "message"


@dataclass(frozen=True, kw_only=True, slots=True)
class Releases:
    """Bounded features, as the ledger of bits knows them."""

    version: str
    """Under which they are charged."""
    bits_per_release: float
    digests: tuple[bytes, ...] = ()
    """One a feature: equal ones are the same feature, sent again."""
    planned: int = 0
    """Of this version in all, those that were charged already among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Something for the tenant's process to do."""

    sitting: str
    number: int
    """From 0, without gaps."""
    kind: Kind
    fields: Mapping[str, Any] = field(default_factory=dict)
    """JSON."""
    arrays: Mapping[str, Array] = field(default_factory=dict, repr=False)
    releases: Releases | None = field(default=None, repr=False)
    """What is charged before it goes out. It stays with the producer."""

    @property
    def tag(self) -> str:
        """Names it among all works of all sittings, as an entity tag (RFC 9110)."""
        return _tag(self.sitting, self.number)

    @property
    def answer_values(self) -> int:
        """The most numbers that its answer may hold."""
        return int(self.arrays["features"].size) if self.kind == "learn" else 0

    def to_bytes(self, precision: Precision) -> bytes:
        """As it travels; features in that precision."""
        return _pack(
            {"sitting": self.sitting, "number": self.number, "kind": self.kind, "fields": self.fields},
            self.arrays,
            precision,
        )

    @classmethod
    def from_bytes(cls, body: bytes, *, max_bytes: int) -> Work:
        """Raises `ProtocolError`."""
        said, arrays = _unpack(body, max_bytes=max_bytes, max_values=max_bytes)
        if said.get("kind") not in get_args(Kind):
            raise ProtocolError(f"the producer sent a work of unknown kind {said.get('kind')!r}: update this program")
        return cls(
            sitting=_text(said, "sitting"),
            number=_number(said, "number"),
            kind=said["kind"],
            fields=_mapping(said, "fields"),
            arrays=arrays,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a tenant's process says: the answer to a work, or that it is there."""

    process: str
    """Random name of the process: another one knows nothing of what this one was told."""
    sitting: str = ""
    number: int = HELLO
    precision: Precision = "fp32"
    """In which it wants features, and sends gradients."""
    error: str = ""
    """What went wrong in its place; empty if nothing did."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict, repr=False)

    @property
    def tag(self) -> str:
        """Of the work that it answers; empty where it answers none."""
        return "" if self.number == HELLO else _tag(self.sitting, self.number)

    def to_bytes(self) -> bytes:
        """As it travels."""
        said = {
            "process": self.process,
            "sitting": self.sitting,
            "number": self.number,
            "precision": self.precision,
            "error": self.error,
            "fields": self.fields,
        }
        return _pack(said, self.arrays, self.precision)

    @classmethod
    def from_bytes(cls, body: bytes, *, max_bytes: int, max_values: int) -> Reply:
        """Of bytes that may be anything. Raises `ProtocolError`."""
        said, arrays = _unpack(body, max_bytes=max_bytes, max_values=max_values)
        precision = said.get("precision")
        if precision not in get_args(Precision):
            raise ProtocolError(f"unknown precision; known: {', '.join(get_args(Precision))}")
        return cls(
            process=_text(said, "process"),
            sitting=_text(said, "sitting"),
            number=_number(said, "number"),
            precision=cast("Precision", precision),
            error=_text(said, "error"),
            fields=_mapping(said, "fields"),
            arrays=arrays,
        )


# -- the types of `orchestrator.wire` ----------------------------------------------------------------------------------


def offer_fields(offer: TaskOffer, config: ConsumerConfig) -> dict[str, Any]:
    """What a tenant is told in order to build its head, and how the producer proposes to train it."""
    return {
        "spec": offer.spec.to_json(),
        "shape": list(offer.contract.shape),
        "backbone": offer.backbone,
        "split_index": offer.split_index,
        "n_train": offer.n_train,
        "n_features": offer.n_features,
        "bits_per_feature": offer.bits_per_feature,
        "config": dataclasses.asdict(config),
    }


def read_offer(fields: Mapping[str, Any]) -> tuple[TaskOffer, ConsumerConfig]:
    """The opposite. Raises `ProtocolError`."""
    try:
        spec = TaskSpec.from_json(dict(fields["spec"]))
        config = dict(fields["config"])
        return TaskOffer(
            spec=spec,
            contract=FeatureContract(task=spec.name, shape=tuple(int(side) for side in fields["shape"])),
            backbone=str(fields["backbone"]),
            split_index=int(fields["split_index"]),
            n_train=int(fields["n_train"]),
            n_features=int(fields["n_features"]),
            bits_per_feature=None if fields["bits_per_feature"] is None else float(fields["bits_per_feature"]),
        ), ConsumerConfig(**{**config, "optimiser": OptimiserConfig(**config["optimiser"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the producer's offer cannot be read ({error}): update this program") from error


def key_fields(key: PublicKey) -> dict[str, Any]:
    """A public key is no secret."""
    return {"key": key.raw.hex()}


def read_key(task: str, reply: Reply) -> PublicKey:
    """Raises `ProtocolError`; whether it is a point of the curve shows when labels are sealed to it."""
    try:
        return PublicKey(task=task, raw=bytes.fromhex(_text(reply.fields, "key")))
    except ValueError as error:
        raise ProtocolError(f"the tenant of task {task!r} sent a public key that is no hexadecimal text") from error


def sealed_arrays(sealed: SealedLabels) -> dict[str, Array]:
    """Ciphertext as bytes."""
    parts = {"nonce": sealed.nonce, "ciphertext": sealed.ciphertext, "wrapped_key": sealed.wrapped_key}
    return {name: np.frombuffer(part, dtype=np.uint8) for name, part in parts.items()}


def read_sealed(task: str, work: Work) -> SealedLabels:
    """Raises `ProtocolError`."""
    parts = {name: _array(work.arrays, name, np.uint8).tobytes() for name in ("nonce", "ciphertext", "wrapped_key")}
    return SealedLabels(task=task, subset=_text(work.fields, "subset"), **parts)


def batch_fields(batch: FeatureBatch) -> dict[str, Any]:
    """What goes beside `batch_arrays`."""
    return {"step": batch.step, "subset": batch.subset}


def batch_arrays(batch: FeatureBatch) -> dict[str, Array]:
    """(B,) ids and (B, ...) features."""
    return {"example_ids": batch.example_ids, "features": batch.features}


def read_batch(contract: FeatureContract, work: Work) -> FeatureBatch:
    """Raises `ProtocolError` if it does not hold what was agreed."""
    return FeatureBatch(
        contract=contract,
        step=_number(work.fields, "step"),
        subset=_text(work.fields, "subset"),
        example_ids=_array(work.arrays, "example_ids", np.int64),
        features=_array(work.arrays, "features", np.float32),
    )


def gradient_reply(gradient: FeatureGradient, precision: Precision) -> tuple[dict[str, Any], dict[str, Array]]:
    """(fields, arrays). In half precision a gradient is scaled to at most 1: those of a mean loss are too small for it.

    The scale is a power of two, so nothing but the rounding to 11 bits is lost.
    """
    rows, scale = gradient.gradient, 1.0
    if precision == "fp16" and (largest := float(np.abs(rows).max(initial=0.0))) > 0:
        scale = 2.0 ** math.ceil(math.log2(largest))
        rows = rows / np.float32(scale)
    return {"step": gradient.step, "loss": gradient.loss, "scale": scale}, {"gradient": rows}


def read_gradient(contract: FeatureContract, reply: Reply) -> FeatureGradient:
    """Shape and values are for the producer's guard to judge. Raises `ProtocolError` for what is no gradient at all."""
    rows = _array(reply.arrays, "gradient", np.float32)
    loss, scale = reply.fields.get("loss"), reply.fields.get("scale")
    if not isinstance(loss, float) or not isinstance(scale, float):
        raise ProtocolError(f"the tenant of task {contract.task!r} sent a gradient without loss or scale")
    with np.errstate(over="ignore", invalid="ignore"):
        rows = rows if scale == 1.0 else (rows * np.float32(scale)).astype(np.float32)
    return FeatureGradient(contract=contract, step=_number(reply.fields, "step"), gradient=rows, loss=loss)


def report_fields(report: EvaluationReport) -> dict[str, Any]:
    """Metrics that are not defined are None: JSON has no NaN."""
    metrics = {name: value if math.isfinite(value) else None for name, value in report.metrics.items()}
    return {"subset": report.subset, "n_examples": report.n_examples, "metrics": metrics}


def read_report(task: str, *, subset: str, n_examples: int, reply: Reply) -> EvaluationReport:
    """What the tenant says of its head. Nobody else can measure it. Raises `ProtocolError`."""
    said = _mapping(reply.fields, "metrics")
    if not all(isinstance(name, str) and (v is None or isinstance(v, float)) for name, v in said.items()):
        raise ProtocolError(f"the tenant of task {task!r} sent metrics that are no numbers")
    metrics = {name: math.nan if value is None else value for name, value in said.items()}
    return EvaluationReport(task=task, subset=subset, n_examples=n_examples, metrics=metrics)


def raise_error(task: str, reply: Reply) -> None:
    """What went wrong at the tenant's, as the session knows it from a hosted one."""
    if not reply.error:
        return
    step = reply.fields.get("diverged_at")
    if isinstance(step, int):
        raise NonFiniteLossError(task, step, math.nan)
    raise ProtocolError(f"the tenant of task {task!r} says: {reply.error[:300]}")


# -- inside ------------------------------------------------------------------------------------------------------------


def _tag(sitting: str, number: int) -> str:
    return f'"{sitting}-{number}"'


def _pack(said: Mapping[str, Any], arrays: Mapping[str, Array], precision: Precision) -> bytes:
    text = json.dumps({"protocol": PROTOCOL, **said}, allow_nan=False)
    return encode(arrays, precision=precision, metadata={_FIELD: text})


def _unpack(body: bytes, *, max_bytes: int, max_values: int) -> tuple[dict[str, Any], dict[str, Array]]:
    try:
        arrays, metadata = decode(body, max_bytes=max_bytes, max_values=max_values)
        said = json.loads(metadata[_FIELD], parse_constant=_no_constant)
    except CodecError as error:
        raise ProtocolError(f"a message cannot be read: {error}") from error
    except (KeyError, ValueError, RecursionError) as error:
        raise ProtocolError("a message does not say what it is") from error
    if not isinstance(said, dict) or said.get("protocol") != PROTOCOL:
        raise ProtocolError(f"a message is of another protocol than {PROTOCOL}: update the older side")
    return said, arrays


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _text(said: Mapping[str, Any], name: str) -> str:
    value = said.get(name)
    if not isinstance(value, str):
        raise ProtocolError(f"a message has no text {name!r}")
    return value


def _number(said: Mapping[str, Any], name: str) -> int:
    value = said.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ProtocolError(f"a message has no number {name!r}")
    return value


def _mapping(said: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = said.get(name)
    if not isinstance(value, dict):
        raise ProtocolError(f"a message has no {name!r}")
    return value


def _array(arrays: Mapping[str, Array], name: str, dtype: Any) -> Array:
    array = arrays.get(name)
    if array is None or array.dtype != dtype:
        raise ProtocolError(f"a message has no tensor {name!r} of {np.dtype(dtype).name}")
    return array
