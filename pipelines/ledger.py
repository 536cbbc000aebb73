#!/usr/bin/env python3
"""The privacy ledger: what was ever spent on a data set's images, and what may still be. See ``--help``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pipelines.command import main, open_console

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.privacy.ledger import Account, Ledger
    from orchestrator.settings.ledger import LedgerSettings

_WIDTH = 140
_SHOWN = 12
"""Digits of a fingerprint that are printed."""


def run(settings: LedgerSettings) -> None:
    """Do what was asked, and print what the ledger says now."""
    from orchestrator.checkpoint import write_atomically
    from orchestrator.errors import NotPublishedError
    from orchestrator.privacy.ledger import Ledger
    from orchestrator.settings.ledger import LedgerExport, LedgerLimit, LedgerRelease, LedgerShow

    command = settings.command
    console = open_console(width=_WIDTH)
    if not isinstance(command, LedgerLimit) and not command.path.exists():
        raise NotPublishedError(f"there is no ledger at {command.path}: nothing was trained yet with this storage")
    with Ledger(command.path) as ledger:
        match command:
            case LedgerLimit():
                fingerprint, name = _images(ledger, command.data)
                account = ledger.set_limit(fingerprint, name, epsilon=command.epsilon, delta=command.delta)
                _show(console, account)
            case LedgerRelease():
                ledger.release(command.reservation)
                console.print(f"reservation {command.reservation} is released; what it spent stays spent")
            case LedgerExport():
                content = {"ledger": [account.to_json() for account in ledger.accounts()]}
                write_atomically(command.out, (json.dumps(content, indent=2) + "\n").encode())
                console.print(f"wrote {command.out}")
            case LedgerShow(data=None):
                for account in ledger.accounts():
                    _show(console, account)
            case LedgerShow():
                _show(console, ledger.account(_images(ledger, str(command.data))[0]))


def _images(ledger: Ledger, data: str) -> tuple[str, str]:
    """(fingerprint, name) of a data set: of its images where it can be read, else as the ledger knows it."""
    from tasks.datasets import SOURCES, open_dataset

    if data.partition(":")[0] in SOURCES or data.endswith(".parquet"):
        table = open_dataset(data, image_size=8)
        return table.image_set, table.name
    account = ledger.account(data)
    return account.fingerprint, account.name


def _show(console: Console, account: Account) -> None:
    from rich.table import Table

    from orchestrator.privacy.accounting import rounded_up

    delta = account.delta
    console.print(f"\n[bold]{account.name}[/bold]  images {account.fingerprint[:_SHOWN]}")
    if delta is None:
        console.print("  nothing was trained with differential privacy")
    else:
        limit = "no limit is set" if account.limit is None else f"the limit is {account.limit[0]:g}"
        spent, committed = rounded_up(account.spent(delta)), rounded_up(account.committed(delta))
        console.print(
            f"  epsilon {spent} is spent, {committed} with what is reserved; {limit} "
            f"(at delta {delta:g}, per image added or removed, composed by Renyi DP)"
        )
    if account.entries:
        table = Table("no.", "run", "part", "mode", "noise", "sample rate", "steps", "of", "state", box=None)
        for entry in account.entries:
            mechanism = entry.mechanism
            state = "over" if entry.released else "reserved"
            table.add_row(
                *(str(entry.id), entry.run, entry.part, entry.mode, f"{mechanism.noise_multiplier:.4f}"),
                *(f"{mechanism.sample_rate:.3e}", str(entry.charged), str(mechanism.steps), state),
            )
        console.print(table)
    if account.outside:
        console.print("  outside the accounting:")
    for at, name, what in account.outside:
        console.print(f"    {at[:19]}  {name}  {what}")


if __name__ == "__main__":
    main("orchestrator.settings.ledger:LedgerSettings", run, prog="ledger.py")
