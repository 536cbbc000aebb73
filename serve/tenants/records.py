"""The words of the registry: roles, verbs, and what is known of a tenant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

Role = Literal["tenant", "device", "operator"]
"""tenant: a customer; device: a camera of the producer's; operator: who runs the cluster."""
Verb = Literal["publish", "read", "metadata", "train", "operate"]
"""publish: send images of a task; read: its features; metadata: what they are; train: its head from outside; operate:
look at it and steer it."""

ROLES: Final[tuple[Role, ...]] = get_args(Role)
VERBS: Final[tuple[Verb, ...]] = get_args(Verb)
VERBS_OF_ROLE: Final[Mapping[Role, frozenset[Verb]]] = {
    "tenant": frozenset({"read", "metadata", "train"}),
    "device": frozenset({"publish"}),
    "operator": frozenset({"operate"}),
}
"""What a role may be granted. An operator is granted nothing: every task is its to operate."""
NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}", re.ASCII)
"""Of tenants and tasks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRecord:
    """What is known of a token: not the token."""

    id: str
    created: float
    expires: float | None
    """Unix time from which it is refused; None: never."""
    revoked: float | None
    """Unix time at which it was revoked."""

    def is_valid(self, now: float) -> bool:
        """Whether it is accepted."""
        return self.revoked is None and (self.expires is None or now < self.expires)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """One task of a tenant."""

    task: str
    verbs: frozenset[Verb]
    """Empty: it was taken back; what was used of the quota stays known."""
    features: int
    """Released so far."""
    features_limit: int | None
    """How many may be released in all; None: any number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantRecord:
    """Everything about one tenant, device or operator."""

    id: int
    name: str
    role: Role
    created: float
    requests_per_minute: int | None
    """None: any number."""
    tokens: tuple[TokenRecord, ...]
    grants: tuple[Grant, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What the registry knows of one token and what it asks for, read as one state."""

    digest: bytes
    token: TokenRecord
    tenant_id: int
    tenant: str
    role: Role
    requests_per_minute: int | None
    granted: bool
    features: int
    features_limit: int | None

    def has_room_for(self, features: int) -> bool:
        """Whether so many features more do not pass the limit."""
        return self.features_limit is None or self.features + features <= self.features_limit
