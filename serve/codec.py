"""The bodies of feature endpoints: tensors as safetensors, in one of three precisions, plain or under zstd.

    fp32    float32
    fp16    float16; a tensor with values beyond its range (65504) stays float32
    int8    eight bits q a value, x = q * scale + zero, with a scale and a zero per example and channel. They travel as
            ``name``, ``name.scale`` and ``name.zero``

Integers pass as they are. Whatever was sent, `decode` gives floats as float32. Nothing here needs torch or Ray, or a
Python newer than 3.9: the edge client uses it too. Nothing here can run code: there is no pickle in any form.

Axes: N examples, C channels, H and W of a map.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, Final, Literal, cast

import numpy as np
import zstandard
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

MEDIA_TYPE: Final = "application/x-safetensors"
Precision = Literal["fp32", "fp16", "int8"]
Encoding = Literal["identity", "zstd"]
PRECISIONS: Final[tuple[Precision, ...]] = ("fp16", "fp32", "int8")
"""The first is used where a client does not say."""

Array = NDArray[Any]

SCALE: Final = ".scale"
ZERO: Final = ".zero"
MAX_HEADER_BYTES: Final = 64 * 1024
MAX_TENSORS: Final = 256
MAX_DIMENSIONS: Final = 8
_DTYPES: Final[Mapping[str, str]] = {
    "F16": "<f2",
    "F32": "<f4",
    "BOOL": "|b1",
    "I8": "|i1",
    "U8": "|u1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
}
_FP16_MAX: Final = float(np.finfo(np.float16).max)
_LEVELS: Final = 255
_CELLS_PER_SCALE: Final = 16
"""A map of fewer cells shares its scale with the example's other channels: two float32 for a few bytes save nothing."""
_ZSTD_LEVEL: Final = 1
"""On features after a ReLU higher levels save little, and take longer than the network."""


class CodecError(ValueError):
    """A body, or what was asked of one, that this codec does not take. Says why, and nothing of the content."""


# -- tensors -----------------------------------------------------------------------------------------------------------


def encode(
    arrays: Mapping[str, Array], *, precision: Precision = "fp16", metadata: Mapping[str, str] | None = None
) -> bytes:
    """A safetensors file. Floats are written in that precision, integers and booleans as they are.

    With int8 a value is off by at most half a step, (max - min) / 510 of what shares the scale, and what else is in the
    batch makes no difference. Raises `CodecError` for an unknown precision, a reserved name, another kind of array, or
    values that are not finite with int8.
    """
    if precision not in PRECISIONS:
        raise CodecError(f"no precision {precision!r}; known: {', '.join(PRECISIONS)}")
    written: dict[str, Array] = {}
    for name, array in arrays.items():
        if name.endswith((SCALE, ZERO)):
            raise CodecError(f"tensor name {name!r}: endings {SCALE} and {ZERO} are the codec's own")
        if array.dtype.kind == "f":
            written.update(_written(name, array, precision))
        elif array.dtype.newbyteorder("<").str in _DTYPES.values():
            written[name] = array
        else:
            raise CodecError(f"tensor {name!r} is of type {array.dtype}, which does not travel")
    if len(written) > MAX_TENSORS:
        raise CodecError(f"{len(written)} tensors are more than the {MAX_TENSORS} that a body may hold")
    # Unlike `ascontiguousarray` this leaves an array without dimensions as it is.
    return save({name: np.asarray(array, order="C") for name, array in written.items()}, dict(metadata or {}) or None)


def decode(
    body: bytes, *, max_bytes: int, max_values: int, finite: bool = False
) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors, metadata) of a body that may be anything. Floats come as float32, and nothing is shared with ``body``.

    ``max_values`` bounds the numbers of all tensors together, and so what is allocated: it is checked against the
    header before anything is. Raises `CodecError` for a body that is longer, malformed, truncated, or holds a type that
    does not travel; with ``finite`` also if a float is NaN or infinite.
    """
    if len(body) > max_bytes:
        raise CodecError(f"the body has {len(body):,} bytes, and {max_bytes:,} are allowed")
    header = _header(body)
    metadata = _metadata(header.pop("__metadata__", None))
    _check_sizes(header, max_values)
    try:
        arrays = _dequantised({name: _array(spec) for name, spec in deserialize(body)})  # type: ignore[no-untyped-call]
    except CodecError:
        raise
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError):
        raise CodecError("the body is not a whole safetensors file") from None
    if finite:
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise CodecError(f"tensor {name!r} holds NaN or infinity")
    return arrays, metadata


def _written(name: str, array: Array, precision: Precision) -> dict[str, Array]:
    if precision == "int8" and array.size:
        return _quantised(name, array.astype(np.float32, copy=False))
    largest = np.abs(array, out=np.zeros(array.shape), where=np.isfinite(array)).max(initial=0.0)
    if precision == "fp32" or largest > _FP16_MAX:
        return {name: array.astype(np.float32, copy=False)}
    return {name: array.astype(np.float16, copy=False)}


def _quantised(name: str, array: NDArray[np.float32]) -> dict[str, Array]:
    axes = _sharing(array.shape)
    low, high = array.min(axis=axes, keepdims=True), array.max(axis=axes, keepdims=True)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise CodecError(f"tensor {name!r} holds NaN or infinity, which 8 bits cannot say")
    scale = (high.astype(np.float64) - low) / _LEVELS
    steps = np.divide(array - low.astype(np.float64), scale, out=np.zeros(array.shape), where=scale > 0)
    q = np.rint(steps).astype(np.uint8)
    return {name: q, name + SCALE: scale.astype(np.float32), name + ZERO: low}


def _sharing(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes along which values share a scale: never that of the examples."""
    per_example, per_channel = tuple(range(1, len(shape))), tuple(range(2, len(shape)))
    return per_channel if len(shape) > 2 and math.prod(shape[2:]) >= _CELLS_PER_SCALE else per_example


def _header(body: bytes) -> dict[str, Any]:
    if len(body) < 8:
        raise CodecError("the body is too short for a safetensors file")
    (length,) = struct.unpack_from("<Q", body)
    if length > MAX_HEADER_BYTES or 8 + length > len(body):
        raise CodecError(f"the body announces a header of {length:,} bytes, which it does not hold or may not have")
    try:
        header = json.loads(body[8 : 8 + length], object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError):
        raise CodecError("the header of the body is no JSON object, or names a key twice") from None
    if not isinstance(header, dict):
        raise CodecError("the header of the body is no JSON object")
    return header


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CodecError("the metadata of the body is no mapping of text to text")
    return cast("dict[str, str]", found)


def _check_sizes(header: Mapping[str, Any], max_values: int) -> None:
    if len(header) > MAX_TENSORS:
        raise CodecError(f"{len(header)} tensors are more than the {MAX_TENSORS} that a body may hold")
    values = 0
    for spec in header.values():
        dtype, shape = (spec.get("dtype"), spec.get("shape")) if isinstance(spec, dict) else (None, None)
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CodecError(f"a tensor's type is none of {', '.join(_DTYPES)}")
        if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
            raise CodecError("a tensor's shape is no list of sizes")
        if len(shape) > MAX_DIMENSIONS:
            raise CodecError(f"a tensor has more than {MAX_DIMENSIONS} dimensions")
        values += math.prod(shape)
        if values > max_values:
            raise CodecError(f"the body holds more than the {max_values:,} numbers that are allowed")


def _array(spec: Mapping[str, Any]) -> Array:
    array = np.frombuffer(spec["data"], dtype=_DTYPES[spec["dtype"]]).reshape(spec["shape"])
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _dequantised(raw: Mapping[str, Array]) -> dict[str, Array]:
    found = {name: array for name, array in raw.items() if not name.endswith((SCALE, ZERO))}
    for name in {name.removesuffix(SCALE).removesuffix(ZERO) for name in raw.keys() - found.keys()}:
        q, scale, zero = raw.get(name), raw.get(name + SCALE), raw.get(name + ZERO)
        if q is None or scale is None or zero is None:
            raise CodecError("a quantised tensor comes without its scale or zero")
        if q.dtype != np.uint8 or scale.dtype.kind != "f" or zero.dtype.kind != "f":
            raise CodecError("a quantised tensor, its scale or zero is of the wrong type")
        if not (scale.shape == zero.shape and _fits(scale.shape, q.shape)):
            raise CodecError("a quantised tensor does not have the shape of its scale and zero")
        with np.errstate(over="ignore", invalid="ignore"):  # of a hostile scale; `decode` says whether it is finite
            found[name] = q.astype(np.float32) * scale.astype(np.float32) + zero.astype(np.float32)
    return found


def _fits(small: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether the one shape spreads over the other without making it larger."""
    return len(small) == len(full) and all(side in (1, full[i]) for i, side in enumerate(small))


# -- compression -------------------------------------------------------------------------------------------------------


def compress(body: bytes, encoding: Encoding) -> bytes:
    """The body under that content encoding. Raises `CodecError` for an unknown one."""
    if encoding == "identity":
        return body
    if encoding == "zstd":
        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(body)
    raise CodecError(f"no content encoding {encoding!r}; known: identity, zstd")


def decompress(body: bytes, encoding: str, *, max_bytes: int) -> bytes:
    """The opposite. Never more than ``max_bytes`` are allocated, however little a bomb weighs.

    A zstd frame must state the size of its content, as `compress` and every one-shot compressor writes it. Raises
    `CodecError` for a body that is larger unpacked, damaged, truncated, or followed by anything.
    """
    if encoding in ("", "identity"):
        if len(body) > max_bytes:
            raise CodecError(f"the body has {len(body):,} bytes, and {max_bytes:,} are allowed")
        return body
    if encoding != "zstd":
        raise CodecError("the body is under an unknown content encoding; known: identity, zstd")
    try:
        size = zstandard.frame_content_size(body)
        if size < 0:
            raise CodecError("the zstd body does not state its size: compress it in one call")
        if size > max_bytes:
            raise CodecError(f"the body unpacks to {size:,} bytes, and {max_bytes:,} are allowed")
        return zstandard.ZstdDecompressor().decompress(body, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError:
        raise CodecError("the body is no whole zstd frame") from None


# -- negotiation -------------------------------------------------------------------------------------------------------


def media_type(precision: Precision) -> str:
    """What stands in ``Content-Type``, and in the ``Accept`` of a client that wants this precision."""
    return f"{MEDIA_TYPE};precision={precision}"


def negotiate(accept: str, accept_encoding: str) -> tuple[Precision, Encoding]:
    """(precision, content encoding) of the answer to a request with these headers, which may be empty.

    The precision is a parameter of the media type: ``application/x-safetensors;precision=int8``. fp16 is what ranges
    without one get, and zstd is used where it is accepted. Raises `CodecError` where nothing that is accepted exists.
    """
    best: tuple[float, int, Precision] | None = None
    for kind, parameters in _ranges(accept or "*/*"):
        if kind not in (MEDIA_TYPE, "application/*", "*/*"):
            continue
        wanted = parameters.get("precision", PRECISIONS[0])
        quality = _quality(parameters)
        if wanted in PRECISIONS and quality > 0:
            # Of equal quality the more specific range wins (RFC 9110, 12.5.1), and then the first.
            candidate = (quality, int(kind == MEDIA_TYPE) + int("precision" in parameters), wanted)
            best = candidate if best is None or candidate[:2] > best[:2] else best
    if best is None:
        raise CodecError(f"only {MEDIA_TYPE} is here, with precision {', '.join(PRECISIONS)}")
    codings = {name: _quality(parameters) for name, parameters in _ranges(accept_encoding)}
    accepted = codings.get("zstd", codings.get("*", 0.0)) > 0
    return best[2], "zstd" if accepted else "identity"


def _ranges(header: str) -> list[tuple[str, dict[str, str]]]:
    """(name, parameters) of the parts of an Accept header, in lower case."""
    found = []
    for part in header.lower().split(","):
        name, *rest = (piece.strip() for piece in part.split(";"))
        parameters = {key.strip(): value.strip(' "') for key, _, value in (p.partition("=") for p in rest)}
        if name:
            found.append((name, parameters))
    return found


def _quality(parameters: Mapping[str, str]) -> float:
    try:
        quality = float(parameters.get("q", "1"))
    except ValueError:
        return 0.0
    return quality if 0 <= quality <= 1 else 0.0
