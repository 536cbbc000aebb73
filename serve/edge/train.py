#!/usr/bin/env python3
"""Train a head against a producer's session, from wherever the tenant is: ``python -m serve.edge.train --help``.

The head, its optimiser and the labels stay here. What comes is features and sealed labels, what goes is gradients. It
needs torch, torchvision and onnx beside the base packages, and Python 3.11: pip install 'metamorphosis-ray[tenant]'.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from serve.edge.link import Link, Patience, read_token
from tasks.errors import MetaMorphosisError

if TYPE_CHECKING:
    from orchestrator.consumer import ConsumerConfig
    from orchestrator.wire import EvaluationReport, TaskOffer
    from serve.remote.trainer import Progress, Trained


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit status: 0 published; 1 not; 2 what was asked cannot be done; 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        _say("interrupted: the same command goes on where the producer's session kept its last state")
        return 130
    except MetaMorphosisError as error:
        _say(f"error: {error}")
        return error.exit_code
    except ModuleNotFoundError as error:
        _say(f"error: this command needs {error.name}: pip install 'metamorphosis-ray[tenant]' (Python 3.11 or newer)")
        return 2


def _run(arguments: argparse.Namespace) -> int:
    token, patience = read_token(arguments.token_file), Patience(total_s=arguments.patience_s)
    import torch

    from orchestrator.memory import keep_freed_memory
    from orchestrator.network import pick_device
    from serve.remote.trainer import Trainer, train
    from serve.tenant_key import read_tenant_key

    keep_freed_memory()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    trainer = Trainer(
        read_tenant_key(arguments.key_file, make=True),
        arguments.state,
        task=arguments.task,
        precision=arguments.precision,
        device=pick_device(arguments.device),
        choose=lambda proposed: dataclasses.replace(proposed, head=arguments.head or proposed.head),
        progress=_lines(),
    )
    with Link(
        arguments.url, token, ca=arguments.ca, plain_http=arguments.plain_http, timeout_s=120.0, patience=patience
    ) as link:
        trained = train(link, trainer, keep=lambda trained: _keep(trained, arguments.out))
    if trained.version is None:
        _say(f"error: the task was not published ({trained.reason or 'the producer does not say why'})")
        return 1
    return 0


def _keep(trained: Trained, folder: Path) -> None:
    """Write the head, and once more for the edge client if its feature was published."""
    from orchestrator.checkpoint import save_weights, write_atomically
    from orchestrator.errors import UnavailableError
    from serve.heads import card_of, export_head

    weights = folder / trained.task / "weights.safetensors"
    try:
        save_weights(weights, trained.head.state, trained.head.config)
        print(f"{weights}: the head; nobody else has it")
        if trained.version is not None:
            card = card_of(trained.offer.spec, trained.version, trained.offer.contract.shape)
            path = weights.with_name(f"{trained.task}-{trained.version}.onnx")
            write_atomically(path, export_head(trained.network, card))
            print(f"{path}: the same for the edge client, for version {trained.version} of the feature")
    except OSError as error:
        raise UnavailableError(
            f"cannot write the head to {weights.parent} ({error.strerror or error}): the same command, started again "
            "at once, has it from the states that it kept"
        ) from error


def _lines() -> Progress:
    """Says how it goes, a line an event."""
    from serve.remote.trainer import Progress

    losses: list[float] = []

    class Lines(Progress):
        def on_begin(self, offer: TaskOffer, config: ConsumerConfig) -> None:
            shape = "x".join(map(str, offer.contract.shape))
            told = f"features of {shape}, {offer.n_train} training examples, {config.total_steps} steps"
            print(f"task {offer.spec.name}: {told}, a {config.head} head", flush=True)

        def on_step(self, step: int, loss: float) -> None:
            losses.append(loss)

        def on_report(self, report: EvaluationReport) -> None:
            metrics = ", ".join(f"{name} {value:.3f}" for name, value in report.metrics.items())
            loss = f"loss {sum(losses) / len(losses):.6f}, " if losses else ""
            print(f"{loss}{report.subset}: {metrics}", flush=True)
            losses.clear()

    return Lines()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve.edge.train", description="Train a head from the edge.")
    parser.add_argument("--url", required=True, help="where the producer's session listens (add_task.py --remote)")
    parser.add_argument("--task", required=True, help="the task that was bought")
    parser.add_argument("--token-file", required=True, type=Path, help="file with the token; chmod 600")
    parser.add_argument(
        "--key-file", required=True, type=Path, help="private key that opens the labels; made if absent"
    )
    parser.add_argument("--state", type=Path, default=Path("states"), help="folder for the head's states (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("heads"), help="folder for the trained head (%(default)s)")
    parser.add_argument("--ca", type=Path, help="PEM file of the authority that signed the server's certificate")
    parser.add_argument("--plain-http", action="store_true", help="allow http:// to another machine, unencrypted")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp32", help="(%(default)s)")
    parser.add_argument("--head", choices=["backbone", "linear", "mlp"], help="default: what the producer proposes")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="PyTorch threads")
    parser.add_argument("--patience-s", type=float, default=3600.0, help="time without an answer (%(default)s)")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
