"""Files that survive being interrupted, and say so when they did not. No pickles: reading one cannot run code.

A state file is one safetensors file. Its header carries, beside the tensors' shapes, a JSON tree that says where each
of them belongs, the kind of state, the format's version and a SHA-256 over all of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from orchestrator.errors import CheckpointError

_MAGIC = "metamorphosis-state"
_VERSION = 1
CONFIG_NAME = "config.json"
"""What `save_weights` writes beside the weights."""

Node = Any
"""A part of the JSON tree."""


def save_state(path: Path, state: Mapping[str, Any], *, kind: str) -> None:
    """Write a nested state so that ``path`` holds either all of it or what it held before.

    Leaves may be tensors, numpy arrays and scalars, bytes, str, int, float, bool and None, in dicts with str or int
    keys, lists and tuples. `load_state` gives back equal values of the same types; tensors come back on the CPU.
    Raises `CheckpointError` for anything else, and `OSError` if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, tensors, "state"))
    metadata = {
        "format": _MAGIC,
        "version": str(_VERSION),
        "kind": kind,
        "tree": tree,
        "sha256": _digest(kind, tree, tensors),
    }
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_state(path: Path, *, kind: str) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises `CheckpointError` for a file that is missing, truncated, changed, foreign, of another kind or version.
    """
    data = _read(path)
    metadata = _header(path, data).get("__metadata__", {})
    if metadata.get("format") != _MAGIC:
        raise CheckpointError(f"{path} is not a saved state (a safetensors file of other origin)")
    if metadata.get("version") != str(_VERSION):
        raise CheckpointError(
            f"{path} has format version {metadata.get('version')}, this program reads {_VERSION}: "
            "use the program that wrote it, or start anew"
        )
    if metadata.get("kind") != kind:
        raise CheckpointError(f"{path} holds a state of kind {metadata.get('kind')!r}, not {kind!r}")
    tensors = _tensors(path, data)
    tree = metadata.get("tree", "")
    if _digest(kind, tree, tensors) != metadata.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    decoded: dict[str, Any] = _decode(json.loads(tree), tensors)
    return decoded


def save_weights(path: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Write a module's weights as a plain safetensors file, and beside it `CONFIG_NAME`, for a published artefact.

    The JSON file is ``{"config": ..., "sha256": ...}``. It is written last, so a folder that has one is whole. Returns
    the SHA-256 of the weights file, which is a function of names, shapes, dtypes and values alone.
    """
    data = safetensors.torch.save({name: _own(torch.as_tensor(value)) for name, value in state.items()})
    digest = hashlib.sha256(data).hexdigest()
    write_atomically(path, data)
    text = json.dumps({"config": dict(config), "sha256": digest}, indent=2, allow_nan=False)
    write_atomically(path.parent / CONFIG_NAME, text.encode())
    return digest


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, config) that `save_weights` wrote. Raises `CheckpointError` unless both are there and belong together."""
    data, beside = _read(path), path.parent / CONFIG_NAME
    try:
        described = json.loads(_read(beside))
        config, digest = dict(described["config"]), described["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{beside} is damaged: {error}") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match the checksum in {beside.name}")
    return _tensors(path, data), config


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file. Raises `CheckpointError`."""
    return _tensors(path, _read(path))


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted names, dtypes, shapes and values: equal weights have equal hashes, on any device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():  # an empty tensor may have a stride of 0, of which no bytes can be viewed
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, or leave it as it was. The content is on the disk before the name points to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """The rename itself is only lasting once the folder is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- the tree ----------------------------------------------------------------------------------------------------------
# JSON's own values stand for themselves; everything that JSON lacks is an object with one key, which names its type.


def _encode(value: object, tensors: dict[str, Tensor], where: str) -> object:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    # numpy's float64 is a float too, but is to come back as what it was.
    if isinstance(value, float) and not isinstance(value, np.generic):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Mapping):
        return {"dict": [[_key(k, where), _encode(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, tensors, f"{where}.{i}") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    kind, tensor = _leaf(value, where)
    name = f"{len(tensors):06d}:{where}"
    tensors[name] = _own(tensor)
    return {kind: name}


def _key(key: object, where: str) -> str | int:
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        raise CheckpointError(f"cannot save {where}: its key {key!r} is neither a str nor an int")
    return key


def _leaf(value: object, where: str) -> tuple[str, Tensor]:
    if isinstance(value, Tensor):
        return "tensor", value
    if isinstance(value, (bytes, bytearray)):
        return "bytes", torch.from_numpy(np.frombuffer(bytes(value), dtype=np.uint8).copy())
    if isinstance(value, (np.ndarray, np.generic)):
        try:
            # A copy in C order and native byte order; `np.ascontiguousarray` would turn a scalar into a vector.
            array = np.array(value, dtype=value.dtype.newbyteorder("="), order="C", copy=True)
            return ("array" if isinstance(value, np.ndarray) else "scalar"), torch.from_numpy(array)
        except TypeError as error:
            raise CheckpointError(f"cannot save {where}: no place for numpy values of dtype {value.dtype}") from error
    raise CheckpointError(
        f"cannot save {where}: a {type(value).__name__} is neither a tensor, an array, bytes nor a JSON value"
    )


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, dense, and sharing memory with no other tensor: safetensors stores bytes, not views."""
    return tensor.detach().to("cpu", copy=True).contiguous()


_DECODERS = {
    "tensor": lambda tensor: tensor,
    "array": lambda tensor: tensor.numpy(),
    "scalar": lambda tensor: tensor.numpy()[()],
    "bytes": lambda tensor: tensor.numpy().tobytes(),
}


def _decode(node: Node, tensors: Mapping[str, Tensor]) -> Node:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "dict":
        return {key: _decode(value, tensors) for key, value in content}
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return float(content) if kind == "float" else _DECODERS[kind](tensors[content])


def _digest(kind: str, tree: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(json.dumps([_MAGIC, _VERSION, kind, tree, weights_hash(tensors)]).encode()).hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _header(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON header: eight bytes of length, little-endian, and then so many bytes."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise CheckpointError(f"{path} is truncated, or not a safetensors file ({len(data)} bytes)")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not an object")
    return header


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return dict(safetensors.torch.load(data))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
