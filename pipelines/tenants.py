#!/usr/bin/env python3
"""Tenants, devices and operators: who may ask for which features, and what they did. See ``--help``."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from pipelines.command import main, open_console

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from orchestrator.privacy.bounded.bit_ledger import BitLedger
    from serve.tenants.audit import AuditLine, AuditLog
    from serve.tenants.gate import Places
    from serve.tenants.records import TenantRecord
    from serve.tenants.registry import Issued, Registry
    from serve.tenants.settings import (
        QuotaSettings,
        TenantsAdd,
        TenantsAudit,
        TenantsGrant,
        TenantsList,
        TenantsRevoke,
        TenantsRotate,
        TenantsSettings,
        TokenSettings,
    )

_WIDTH = 140
_DONE = 200


def run(settings: TenantsSettings) -> None:
    """Do what was asked, write it down, and print what holds now."""
    from serve.tenants.settings import TenantsAdd, TenantsAudit, TenantsGrant, TenantsList, TenantsRevoke, TenantsRotate

    match settings.command:
        case TenantsAudit() as command:
            _audit(command)
        case TenantsAdd() | TenantsGrant() | TenantsRevoke() | TenantsRotate() | TenantsList() as command:
            with _Books(command.places, begin=isinstance(command, TenantsAdd)) as books:
                match command:
                    case TenantsAdd():
                        _add(books, command)
                    case TenantsGrant():
                        _grant(books, command)
                    case TenantsRevoke():
                        _revoke(books, command)
                    case TenantsRotate():
                        _rotate(books, command)
                    case TenantsList():
                        _list(books, command)


class _Books:
    """The registry and what is beside it, open."""

    def __init__(self, places: Places, *, begin: bool) -> None:
        """Raises `ConfigError` where there is none and none is to be begun."""
        from orchestrator.errors import ConfigError
        from orchestrator.privacy.bounded.bit_ledger import BitLedger
        from serve.tenants.audit import AuditLog
        from serve.tenants.registry import Registry

        if not begin and not places.registry.exists():
            raise ConfigError(f"there is no registry at {places.registry}: begin one with `tenants.py add`")
        self.registry: Registry = Registry(places.registry)
        self.bits: BitLedger = BitLedger(places.bits)
        self.log: AuditLog = AuditLog(places.audit)

    def __enter__(self) -> _Books:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.registry, self.bits, self.log):
            file.close()

    def write(self, name: str, did: str, *, task: str = "", token: str = "", detail: str = "") -> None:
        """Into the audit log: what was done at this command, and by which user of this machine."""
        by = f"by user {os.getuid()}"
        self.log.write(
            tenant=name, token=token, task=task, verb=did, outcome=_DONE, detail=f"{by}: {detail}" if detail else by
        )


# -- commands ----------------------------------------------------------------------------------------------------------


def _add(books: _Books, command: TenantsAdd) -> None:
    from serve.tenants.settings import as_verbs

    rate, now = command.quotas.requests_per_minute, time.time()

    def issue() -> Issued:
        return books.registry.add(
            command.name,
            command.role,
            expires=command.token.ends(now),
            requests_per_minute=rate if isinstance(rate, int) else None,
        )

    _hand_out(books, command.name, command.token, issue, did="add", detail=command.role)
    for task in command.tasks:
        books.registry.grant(command.name, task, as_verbs(command.verbs))
        books.write(command.name, "grant", task=task, detail=",".join(command.verbs) or "all verbs")
    _set_quotas(books, command.name, command.tasks, command.quotas)
    _show(books, [books.registry.tenant(command.name)])


def _grant(books: _Books, command: TenantsGrant) -> None:
    from serve.tenants.settings import as_verbs

    for task in command.tasks:
        books.registry.grant(command.name, task, as_verbs(command.verbs))
        books.write(command.name, "grant", task=task, detail=",".join(command.verbs) or "all verbs")
    rate = command.quotas.requests_per_minute
    if rate is not None:
        books.registry.set_rate(command.name, rate if isinstance(rate, int) else None)
        books.write(command.name, "quota", detail=f"requests per minute {rate}")
    _set_quotas(books, command.name, command.tasks, command.quotas)
    _show(books, [books.registry.tenant(command.name)])


def _revoke(books: _Books, command: TenantsRevoke) -> None:
    if command.tasks:
        for task in command.tasks:
            books.registry.take_back(command.name, task)
            books.write(command.name, "take back", task=task)
    else:
        ended = books.registry.revoke(command.name, command.token)
        books.write(command.name, "revoke", token=command.token or "", detail=f"tokens ended: {ended}")
    _show(books, [books.registry.tenant(command.name)])


def _rotate(books: _Books, command: TenantsRotate) -> None:
    from serve.tenants.moments import span

    def issue() -> Issued:
        ends = command.token.ends(time.time())
        return books.registry.rotate(command.name, grace_s=span(command.grace), expires=ends)

    _hand_out(books, command.name, command.token, issue, did="rotate", detail=f"grace {command.grace}")
    _show(books, [books.registry.tenant(command.name)])


def _list(books: _Books, command: TenantsList) -> None:
    registry = books.registry
    found = registry.tenants() if command.name is None else [registry.tenant(command.name)]
    if command.json:
        print(json.dumps({"tenants": [_as_json(record, books.bits) for record in found]}, indent=2))
    else:
        _show(books, found)


def _audit(command: TenantsAudit) -> None:
    from orchestrator.errors import ConfigError
    from serve.tenants.audit import AuditHead, AuditLog

    if not command.places.audit.exists():
        raise ConfigError(f"there is no audit log at {command.places.audit}: nothing was done with this registry yet")
    noted = None if command.noted is None else AuditHead.parse(command.noted)
    with AuditLog(command.places.audit) as log:
        lines = log.lines(tenant=command.name, last=command.last) if command.last else []
        _print_lines(lines, as_json=command.json)
        head = log.verify(noted)  # after the lines: who looks into what was tampered with wants to see them
    if command.json:
        print(json.dumps({"head": str(head), "verified": True}))
    else:
        print(f"{head.lines} lines, each as it was written. Note this head where nobody here can write:\n{head}")


# -- what they share ---------------------------------------------------------------------------------------------------


def _hand_out(
    books: _Books, name: str, token: TokenSettings, issue: Callable[[], Issued], *, did: str, detail: str
) -> None:
    """Issue a token, and give it to who asked: into a file that can be written for certain, or printed once."""
    from orchestrator.errors import MetaMorphosisError
    from serve.private_files import private_file

    path = None if token.token_file is None else token.token_file.expanduser().absolute()
    with nullcontext() if path is None else private_file(path, what="the token", replace=_holds_token(path)) as file:
        made = issue()
        try:
            books.write(name, did, token=made.token.id, detail=detail)
            if file is not None:
                file.write(made.token.text.encode() + b"\n")
        except MetaMorphosisError as error:
            books.registry.revoke(name, made.token.id)
            error.add_note(f"The token that was made is revoked: make another with `tenants.py rotate {name}`")
            raise
    if path is None:
        print(f"The token of {name}, which is not shown again:\n{made.token.text}")
    else:
        print(f"wrote the token of {name} to {path}")


def _holds_token(path: Path) -> bool:
    """Whether a file may be replaced by another token: nothing but a token is overwritten."""
    from orchestrator.errors import DataError
    from serve.private_files import read_private
    from serve.tenants.tokens import Token

    try:
        text = read_private(path, what="the token", most=128).decode(errors="replace")
    except DataError:
        return False
    return Token.from_header(f"Bearer {text.strip()}") is not None


def _set_quotas(books: _Books, name: str, tasks: Sequence[str], quotas: QuotaSettings) -> None:
    features, bits = quotas.features, quotas.bits
    for task in tasks:
        if features is not None:
            books.registry.set_features(name, task, features if isinstance(features, int) else None)
            books.write(name, "quota", task=task, detail=f"features {features}")
        if bits is not None:
            books.bits.set_limit(name, task, float("inf") if bits == "any" else bits)
            books.write(name, "quota", task=task, detail=f"bits {bits if bits == 'any' else f'{bits:g}'}")


def _as_json(record: TenantRecord, bits: BitLedger) -> dict[str, Any]:
    grants = []
    for grant in record.grants:
        account = bits.account(record.name, grant.task).to_json()
        grants.append(
            {
                "task": grant.task,
                "verbs": sorted(grant.verbs),
                "features": grant.features,
                "features_limit": grant.features_limit,
                "bits": account["bits_spent"],
                "bits_limit": account["limit_bits"],
            }
        )
    return {
        "name": record.name,
        "role": record.role,
        "created": record.created,
        "requests_per_minute": record.requests_per_minute,
        "tokens": [
            {"id": token.id, "created": token.created, "expires": token.expires, "revoked": token.revoked}
            for token in record.tokens
        ],
        "grants": grants,
    }


def _show(books: _Books, records: Sequence[TenantRecord]) -> None:
    from rich.table import Table

    from serve.tenants.moments import shown

    console, now = open_console(width=_WIDTH), time.time()
    for record in records:
        rate = record.requests_per_minute
        pace = "any number of requests" if rate is None else f"{rate} requests a minute"
        console.print(f"\n[bold]{record.name}[/bold]  {record.role}, {pace}")
        for token in record.tokens:
            ends = "does not expire" if token.expires is None else f"expires {shown(token.expires)}"
            if token.revoked is not None:
                state = f"revoked {shown(token.revoked)}"
            elif not token.is_valid(now):
                state = f"expired {shown(token.expires or now)}"
            else:
                state = f"valid, {ends}"
            console.print(f"  token {token.id}  made {shown(token.created)}, {state}")
        if record.grants:
            table = Table("task", "may", "features", "of", "bits", "of", box=None, pad_edge=True)
            for grant in record.grants:
                account = books.bits.account(record.name, grant.task)
                limit = "none set" if account.limit_bits is None else f"{account.limit_bits:g}"
                table.add_row(
                    *(grant.task, ", ".join(sorted(grant.verbs)) or "nothing any more", str(grant.features)),
                    "any" if grant.features_limit is None else str(grant.features_limit),
                    *(f"{account.spent_bits:g}", "any" if limit == "inf" else limit),
                )
            console.print(table)


def _print_lines(lines: Sequence[AuditLine], *, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.table import Table
    from rich.text import Text

    from serve.tenants.moments import shown

    if as_json:
        for line in lines:
            print(json.dumps(asdict(line)))
        return
    if not lines:
        return
    table = Table("no.", "when", "who", "token", "verb", "task", "outcome", "detail", box=None)
    for line in lines:
        cells = (str(line.number), shown(line.at), line.tenant or "nobody", line.token, line.verb, line.task)
        table.add_row(*(Text(cell) for cell in (*cells, str(line.outcome), line.detail)))
    open_console(width=_WIDTH).print(table)


if __name__ == "__main__":
    main("serve.tenants.settings:TenantsSettings", run, prog="tenants.py")
