"""The settings of the command of tenants: what flags fill in. A field's docstring is its ``--help``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.settings.shared import RuntimeSettings
from serve.tenants.gate import Places
from serve.tenants.moments import moment, span
from serve.tenants.records import VERBS, VERBS_OF_ROLE, Role, Verb
from serve.tenants.registry import check_name

_INLINE = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryPlace:
    """Where the registry is."""

    storage: Path | None = None
    """The storage folder of the commands that train. Default: $METAMORPHOSIS_HOME, or ~/metamorphosis."""
    registry: Path | None = None
    """The registry's file, on a local disk; its ledgers and logs are beside it. Default: tenants/registry.db in the
    storage folder."""

    @property
    def places(self) -> Places:
        """Absolute."""
        if self.registry is not None:
            return Places(registry=self.registry.expanduser().absolute())
        return Places.in_storage(RuntimeSettings(storage=self.storage).storage_path)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotaSettings:
    """How much may be asked for. What is left out stays as it is."""

    requests_per_minute: int | Literal["any"] | None = None
    """Requests a minute, over all tasks and tokens. Default for somebody new: any number."""
    features: int | Literal["any"] | None = None
    """Features of each of the tasks, in all. Default for a new grant: any number."""
    bits: float | Literal["any"] | None = None
    """Bits of each of the tasks, in all, where features are bounded; any: they are only counted. Until it is set,
    nothing of a bounded task is released."""

    def __post_init__(self) -> None:
        rate, features, bits = self.requests_per_minute, self.features, self.bits
        if isinstance(rate, int) and rate < 1:
            raise ConfigError(f"requests_per_minute must be at least 1, got {rate}: to let nobody in, revoke the token")
        if isinstance(features, int) and features < 0:
            raise ConfigError(f"features must be >= 0, got {features}")
        if isinstance(bits, float) and not (bits >= 0 and math.isfinite(bits)):
            raise ConfigError(f"bits must be a finite number >= 0, or any, got {bits}")

    @property
    def of_tasks(self) -> bool:
        """Whether any is a task's."""
        return self.features is not None or self.bits is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSettings:
    """The token that is made."""

    expires: str | None = None
    """When the token ends: 90d or 12h from now on, or a date as 2027-01-31 (UTC). Default: never."""
    token_file: Path | None = None
    """Write the token to this file, which only its owner can read. Default: print it, once."""

    def __post_init__(self) -> None:
        if self.expires is not None:
            moment(self.expires, now=0.0)

    def ends(self, now: float) -> float | None:
        """Unix time."""
        return None if self.expires is None else moment(self.expires, now=now)


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantsAdd(RegistryPlace):
    """Make somebody known, with a first token, and grant tasks."""

    name: Annotated[str, tyro.conf.Positional]
    """Whom: lower case letters, digits, '-' and '_'."""
    role: Role = "tenant"
    """tenant: a customer; device: a camera of the producer's, which publishes images; operator: who runs it all."""
    tasks: tuple[str, ...] = ()
    """Tasks to grant, as A,B,C. They need not be served yet."""
    verbs: tuple[str, ...] = ()
    """What may be done with them, as A,B,C: read, metadata, train for a tenant, publish for a device. Default: all."""
    quotas: Annotated[QuotaSettings, _INLINE] = QuotaSettings()
    token: Annotated[TokenSettings, _INLINE] = TokenSettings()

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_tasks(self.tasks, self.verbs, self.quotas)
        allowed = VERBS_OF_ROLE[self.role]
        if self.role == "operator" and self.tasks:
            raise ConfigError("an operator may operate every task and is granted nothing: leave --tasks out")
        if wrong := sorted(set(self.verbs) - allowed):
            raise ConfigError(f"a {self.role} may be granted {', '.join(sorted(allowed))}, not {', '.join(wrong)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantsGrant(RegistryPlace):
    """Allow more tasks or verbs, and set quotas. It holds from the next request on."""

    name: Annotated[str, tyro.conf.Positional]
    """Whom."""
    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Tasks, as A,B,C. They need not be served yet."""
    verbs: tuple[str, ...] = ()
    """What may be done with them, as A,B,C, in addition to what is granted. Default: all that the role may."""
    quotas: Annotated[QuotaSettings, _INLINE] = QuotaSettings()

    def __post_init__(self) -> None:
        check_tasks(self.tasks, self.verbs, self.quotas)
        if not self.tasks and self.quotas.requests_per_minute is None:
            raise ConfigError("name tasks to grant, as A,B,C, or give --requests-per-minute")


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantsRevoke(RegistryPlace):
    """End tokens, at once and for good; or, with --tasks, grants. What was used of quotas stays known."""

    name: Annotated[str, tyro.conf.Positional]
    """Whose."""
    token: str | None = None
    """Only this token, by its id, as `list` prints it. Default: all of them."""
    tasks: tuple[str, ...] = ()
    """Take back the grants of these tasks, as A,B,C, in place of tokens."""

    def __post_init__(self) -> None:
        check_tasks(self.tasks, (), QuotaSettings())
        if self.token is not None and self.tasks:
            raise ConfigError("a token ends for all tasks: give --token or --tasks")


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantsRotate(RegistryPlace):
    """Make a new token, and end those before it."""

    name: Annotated[str, tyro.conf.Positional]
    """Whose."""
    grace: str = "0s"
    """For how long the tokens before it are still accepted: 30s, 15m, 12h, 2d."""
    token: Annotated[TokenSettings, _INLINE] = TokenSettings()

    def __post_init__(self) -> None:
        span(self.grace)


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantsList(RegistryPlace):
    """Print who there is, what they were granted, and what they used of it. No tokens: only their ids."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Only this one."""
    json: bool = False
    """As JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantsAudit(RegistryPlace):
    """Print who did what, and verify that no line was changed, put in or taken out. Ends with status 1 if one was."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Only of this one. All lines are verified."""
    last: int = 100
    """Print so many lines, the newest; 0 only verifies."""
    noted: str | None = None
    """A head that `audit` printed earlier: that line is still to be there. Without it, a cut at the end is not seen."""
    json: bool = False
    """As JSON lines, and the head as the last."""

    def __post_init__(self) -> None:
        if self.last < 0:
            raise ConfigError(f"last must be >= 0, got {self.last}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantsSettings:
    """Who may ask for features: tenants, devices and operators, their tokens, grants and quotas."""

    command: Annotated[
        Annotated[TenantsAdd, tyro.conf.subcommand("add")]
        | Annotated[TenantsGrant, tyro.conf.subcommand("grant")]
        | Annotated[TenantsRevoke, tyro.conf.subcommand("revoke")]
        | Annotated[TenantsRotate, tyro.conf.subcommand("rotate")]
        | Annotated[TenantsList, tyro.conf.subcommand("list")]
        | Annotated[TenantsAudit, tyro.conf.subcommand("audit")],
        _INLINE,
    ]


def check_tasks(tasks: tuple[str, ...], verbs: tuple[str, ...], quotas: QuotaSettings) -> None:
    """Before anything is written. Raises `ConfigError`."""
    for task in tasks:
        check_name("task", task)
    for verb in verbs:
        if verb not in VERBS:
            raise UnknownNameError("verb", verb, VERBS)
    if not tasks and (verbs or quotas.of_tasks):
        raise ConfigError("verbs, features and bits are of tasks: name them, as A,B,C")


def as_verbs(verbs: tuple[str, ...]) -> tuple[Verb, ...] | None:
    """For `Registry.grant`, of checked names; None: all of the role."""
    return tuple(verb for verb in VERBS if verb in verbs) or None
