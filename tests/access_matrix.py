"""Everybody, with every kind of token, asks for everything: the cells, and what each has to be answered.

`expected` knows nothing of the registry: it reads the table below. To go through the matrix somewhere else, register
everybody (`register`), and give `failures` a function that asks for a cell there and returns the status:

    with Registry(path) as registry:
        headers = register(registry)
    assert not failures(lambda cell: ask_over_http(cell, headers(cell)), tasks={"smile"}, versions={"latest", "1"})
"""

from __future__ import annotations

import base64
import itertools
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from serve.tenants.registry import Registry

Credential = Literal["valid", "expired", "revoked", "rotated", "other's", "crossed", "malformed", "missing"]
"""other's: the token of the next in the table; crossed: the id of that token with one's own secret."""

WHO: Final[dict[str, tuple[str, dict[str, set[str]]]]] = {
    "alice": ("tenant", {"smile": {"read", "metadata", "train"}}),
    "bob": ("tenant", {"glasses": {"read", "metadata"}}),
    "carol": ("tenant", {"smile": {"metadata"}, "pose": {"read", "metadata", "train"}}),
    "dave": ("tenant", {}),
    "camera": ("device", {"smile": {"publish"}, "pose": {"publish"}}),
    "door": ("device", {"glasses": {"publish"}}),
    "root": ("operator", {}),
}
TASKS: Final = (
    *("smile", "glasses", "pose"),
    "hidden",  # there, and granted to nobody
    "absent",
    *("SMILE", "smile ", "smile\0", "../smile", "smile' OR '1'='1", "%", "*", "", "smil\udce9"),
)
"""The last ones are tampered with; not all of them can be written into a URL."""
VERBS: Final = ("publish", "read", "metadata", "train", "operate")
VERSIONS: Final = ("latest", "1", "2", "99")
CREDENTIALS: Final[tuple[Credential, ...]] = (
    *("valid", "expired", "revoked", "rotated", "other's", "crossed", "malformed", "missing"),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One request."""

    who: str
    credential: Credential
    task: str
    verb: str
    version: str


def cells() -> Iterator[Cell]:
    """All of them."""
    for who, task, verb, version, credential in itertools.product(WHO, TASKS, VERBS, VERSIONS, CREDENTIALS):
        yield Cell(who, credential, task, verb, version)


def following(who: str) -> str:
    """The next in the table."""
    names = list(WHO)
    return names[(names.index(who) + 1) % len(names)]


def expected(cell: Cell, *, tasks: Collection[str] | None = None, versions: Collection[str] | None = None) -> int:
    """The status: 200, 401 or 404. ``tasks`` and ``versions``: those that there are, where that is known."""
    if cell.credential not in {"valid", "other's"}:
        return 401
    role, grants = WHO[following(cell.who) if cell.credential == "other's" else cell.who]
    operates = role == "operator" and cell.verb == "operate"
    if not operates and cell.verb not in grants.get(cell.task, ()):
        return 404
    missing = (tasks is not None and cell.task not in tasks) or (versions is not None and cell.version not in versions)
    return 404 if missing else 200


def failures(
    ask: Callable[[Cell], int],
    *,
    tasks: Collection[str] | None = None,
    versions: Collection[str] | None = None,
    only: Callable[[Cell], bool] = lambda cell: True,
) -> tuple[list[tuple[Cell, int, int]], int]:
    """((cell, answer, expected) of every wrong answer, how many cells were asked)."""
    wrong, asked = [], 0
    for cell in filter(only, cells()):
        answer, right = ask(cell), expected(cell, tasks=tasks, versions=versions)
        asked += 1
        if answer != right:
            wrong.append((cell, answer, right))
    return wrong, asked


def register(registry: Registry) -> Callable[[Cell], str | None]:
    """Everybody of the table, with a token of every kind. Returns the ``Authorization`` header of a cell."""
    tokens = {name: _tokens(registry, name, role) for name, (role, _) in WHO.items()}
    for name, (_, grants) in WHO.items():
        for task, verbs in grants.items():
            registry.grant(name, task, sorted(verbs))

    def header(cell: Cell) -> str | None:
        mine, others = tokens[cell.who], tokens[following(cell.who)]["valid"]
        if cell.credential == "missing":
            return None
        if cell.credential == "malformed":
            forms = malformed(mine["valid"])
            return forms[zlib.crc32(repr(cell).encode()) % len(forms)]
        if cell.credential == "other's":
            return f"Bearer {others}"
        if cell.credential == "crossed":
            return f"Bearer {others[:20]}{mine['valid'][20:]}"
        return f"Bearer {mine[cell.credential]}"

    return header


def malformed(token: str) -> list[str]:
    """Headers that look like that of a valid token, and are not."""
    basic = base64.b64encode(f"alice:{token}".encode()).decode()
    changed = token[:-1] + ("A" if token[-1] != "A" else "B")
    return [
        *("", "Bearer", "Bearer ", token, f"Basic {basic}", f"Token {token}", f"Bearer {token[:-1]}"),
        *(f"Bearer {token}x", f"Bearer {changed}", f"Bearer {token.upper()}", f"Bearer {token} {token}"),
        *(f" Bearer {token}", f"Bearer\t{token}", f"Bearer {token}\n", f"Bearer {token},Bearer {token}"),
        *(f"Bearer mm_{'0' * 16}_{token[20:]}", f"Bearer mm__{token[20:]}", "Bearer " + "A" * 100_000),
        *(f"Bearer {token[:20]}' OR '1'='1", f"Bearer {token}\0", f"Bearer mm_%_{token[20:]}"),
    ]


def _tokens(registry: Registry, name: str, role: str) -> dict[str, str]:
    now, clock = time.time(), registry._clock
    registry._clock = lambda: now - 7200
    expired = registry.add(name, role, expires=now - 3600)  # type: ignore[arg-type]
    registry._clock = clock
    revoked = registry.rotate(name)
    registry.revoke(name, revoked.token.id)
    rotated = registry.rotate(name)
    valid = registry.rotate(name)
    issued = {"expired": expired, "revoked": revoked, "rotated": rotated, "valid": valid}
    return {kind: one.token.text for kind, one in issued.items()}
