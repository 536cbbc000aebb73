"""Print what a head says of a task's features: ``python -m serve.edge --help``. Python 3.9."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from serve.edge.client import EdgeClient, MapPrediction, Prediction
from serve.edge.head import Head
from serve.edge.link import FOR_EVER, Patience, read_token
from tasks.errors import ConfigError, DataError, MetaMorphosisError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit status: 0 done; 1 the server failed; 2 what was asked cannot be done; 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except MetaMorphosisError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _run(arguments: argparse.Namespace) -> None:
    head = Head.load(arguments.head, threads=arguments.threads)
    folder: Path | None = arguments.maps
    if folder is not None:
        if head.card.answer_shape is None:
            raise ConfigError(f"{arguments.head} answers with a class, and gives no map to write: leave --maps out")
        _make(folder)
    patience = FOR_EVER if arguments.follow else Patience()
    if arguments.patience_s is not None:
        patience = Patience(total_s=arguments.patience_s)
    with EdgeClient(
        arguments.url,
        arguments.task,
        read_token(arguments.token_file),
        precision=arguments.precision,
        ca=arguments.ca,
        plain_http=arguments.plain_http,
        patience=patience,
    ) as client:
        asked: dict[str, Any] = {
            "after": arguments.after,
            "follow": arguments.follow,
            "state": arguments.state,
            "on_gap": _tell_gap,
            "on_others": lambda share, served: _tell_others(share, served, head.card.version),
        }
        if head.card.answer_shape is None:
            for prediction in client.predictions(head, **asked):
                print(json.dumps(asdict(prediction)) if arguments.json else _line(prediction), flush=True)
            return
        for found in client.maps(head, **asked):
            path = None if folder is None else _write(folder, found)
            print(_map_json(found, path) if arguments.json else _map_line(found, path), flush=True)


def _line(prediction: Prediction) -> str:
    return f"{prediction.sequence}\t{_when(prediction.time_ms)}\t{prediction.label}\t{prediction.probability:.4f}"


def _map_line(found: MapPrediction, path: Path | None) -> str:
    shape = "x".join(map(str, found.map.shape))
    told = f"a map of {shape}, {found.map.min():.4f} to {found.map.max():.4f}, mean {found.map.mean():.4f}"
    return f"{found.sequence}\t{_when(found.time_ms)}\t{told}" + (f"\t{path}" if path is not None else "")


def _map_json(found: MapPrediction, path: Path | None) -> str:
    told = {name: getattr(found, name) for name in ("sequence", "time_ms", "version")}
    numbers = {name: float(getattr(found.map, name)()) for name in ("min", "max", "mean")}
    written = None if path is None else str(path)
    return json.dumps({**told, "shape": list(found.map.shape), **numbers, "file": written})


def _when(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, tz=timezone.utc).isoformat(timespec="milliseconds")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write maps to {folder}: {error.strerror or error}") from error


def _write(folder: Path, found: MapPrediction) -> Path:
    """``NUMBER.npy``, whole or not at all."""
    path = folder / f"{found.sequence}.npy"
    temporary = folder / f".{found.sequence}.tmp"
    try:
        with temporary.open("wb") as file:
            np.save(file, found.map, allow_pickle=False)
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write a map to {path}: {error.strerror or error}") from error
    return path


def _tell_gap(after: int, oldest: int) -> None:
    told = f"note: the producer does not keep the features after {after} any more; going on from {oldest}"
    print(told, file=sys.stderr, flush=True)


def _tell_others(share: float, served: str, own: str) -> None:
    if share == 0:
        told = f"the producer serves version {served} now; waiting for features of version {own}, which the head is for"
    elif share < 1:
        told = f"{1 - share:.0%} of the features are of another version than the head's now, and are passed over"
    else:
        told = "all features are of the head's version again"
    print(f"note: {told}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve.edge", description="Print what a head says of each feature.")
    parser.add_argument(
        "--url", required=True, help="the producer's server, for instance https://features.example:8000"
    )
    parser.add_argument("--task", required=True, help="the task that was bought")
    parser.add_argument("--token-file", required=True, type=Path, help="file with the token; chmod 600")
    parser.add_argument("--head", required=True, type=Path, help="the head, an ONNX file")
    parser.add_argument("--follow", action="store_true", help="wait for the next, through outages, until Ctrl-C")
    parser.add_argument("--after", type=int, default=0, help="begin after this number (%(default)s)")
    parser.add_argument("--state", type=Path, help="file that remembers the number, for a restart")
    parser.add_argument("--json", action="store_true", help="a JSON object a line, with every class's probability")
    parser.add_argument("--maps", type=Path, help="folder for the maps of a task that answers with maps: NUMBER.npy")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp16", help="(%(default)s)")
    parser.add_argument("--ca", type=Path, help="PEM file of the authority that signed the server's certificate")
    parser.add_argument("--plain-http", action="store_true", help="allow http:// to another machine, unencrypted")
    parser.add_argument("--patience-s", type=float, help="time without an answer (60; for ever with --follow)")
    parser.add_argument("--threads", type=int, help="threads of onnxruntime")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
