"""Self-signed certificates: a client that is given one trusts its hosts, and nobody else's."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from http_server import on_uvicorn

from orchestrator.errors import ConfigError, DataError
from serve.edge.errors import UnreachableError
from serve.edge.link import Link
from serve.publish import Frame, Publisher, PublishError
from serve.tenants import tls
from serve.tenants.tls import self_signed


def shake_hands(certificate: Path, key: Path, host: str, trusted: Path) -> str:
    """The TLS version, of a client that trusts only what it was given and asks for that host."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(trusted))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's default from 3.13 on
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host) as secured:
            return secured.version()
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "camera-7.example.org", "::1", socket.gethostname()])
def test_a_client_that_was_given_it_trusts_every_host_it_is_for(tmp_path, host):
    hosts = ["0.0.0.0", "localhost", "127.0.0.1", "Camera-7.example.org", "[::1]"]
    certificate, key = self_signed(tmp_path, hosts)
    assert shake_hands(certificate, key, host, certificate) == "TLSv1.3"


@pytest.mark.parametrize("host", ["example.org", "127.0.0.2"])
def test_it_is_for_no_other_host(tmp_path, host):
    certificate, key = self_signed(tmp_path, ["localhost", "127.0.0.1"])
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(certificate, key, host, certificate)


def test_who_was_given_another_does_not_trust_it(tmp_path):
    certificate, key = self_signed(tmp_path / "a", ["localhost"])
    other, _ = self_signed(tmp_path / "b", ["localhost"])
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(certificate, key, "localhost", other)


def publish(url: str, ca: Path | None, sleep: Callable[[float], None]) -> None:
    with Publisher(url, "loop", "mm_token", ca=ca, sleep=sleep) as device:
        device.publish(Frame("a.png", b"pixels"))


def ask(url: str, ca: Path | None, sleep: Callable[[float], None]) -> None:
    with Link(url, "mm_token", ca=ca, sleep=sleep) as link:
        link.request("GET", "/tasks/loop/metadata")


@pytest.mark.parametrize(("call", "kind"), [(publish, PublishError), (ask, UnreachableError)])
def test_a_client_that_does_not_trust_it_says_so_at_once_and_sends_nothing(tmp_path, call, kind):
    """Another try would find the same certificate."""
    certificate, key = self_signed(tmp_path, ["127.0.0.1"])
    asked: list[str] = []

    async def app(scope, receive, send):
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    slept: list[float] = []
    with on_uvicorn(app, ssl_certfile=certificate, ssl_keyfile=key) as (host, port):
        url = f"https://{host}:{port}"
        with pytest.raises(kind, match=rf"the certificate of {url} is not trusted .*--ca"):
            call(url, None, slept.append)
        assert (asked, slept) == ([], [])
        call(url, certificate, slept.append)
    assert len(asked) == 1


def test_the_key_is_for_its_owner_alone_and_the_certificate_for_everybody(tmp_path):
    before = os.umask(0)
    try:
        certificate, key = self_signed(tmp_path, ["localhost"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(certificate.stat().st_mode) == 0o644
    assert b"PRIVATE" not in certificate.read_bytes()


def test_it_is_no_authority_and_ends(tmp_path):
    certificate, _ = self_signed(tmp_path, ["localhost"])
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    assert found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert timedelta(days=390) < found.not_valid_after_utc - datetime.now(UTC) < timedelta(days=398)


def test_the_one_that_is_there_is_used_again_for_fewer_hosts_and_not_for_more(tmp_path):
    certificate, key = self_signed(tmp_path, ["localhost", "127.0.0.1"])
    first = certificate.read_bytes(), key.read_bytes()
    self_signed(tmp_path, ["127.0.0.1"])
    assert (certificate.read_bytes(), key.read_bytes()) == first
    self_signed(tmp_path, ["localhost", "camera"])
    assert certificate.read_bytes() != first[0]
    assert shake_hands(certificate, key, "camera", certificate) == "TLSv1.3"


def aged(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tls, "_LASTS", timedelta(days=13))


def foreign_key(tmp_path: Path, monkeypatch) -> None:
    _, other = self_signed(tmp_path / "other", ["localhost"])
    (tmp_path / tls.KEY).write_bytes(other.read_bytes())


def open_key(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / tls.KEY).chmod(0o644)


def cut_off(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / tls.CERTIFICATE).write_bytes((tmp_path / tls.CERTIFICATE).read_bytes()[:100])


def lost(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / tls.KEY).unlink()


@pytest.mark.parametrize("fault", [aged, foreign_key, open_key, cut_off, lost])
def test_one_that_is_no_good_any_more_is_made_anew(tmp_path, monkeypatch, fault):
    if fault is aged:
        aged(tmp_path, monkeypatch)
    certificate, key = self_signed(tmp_path, ["localhost"])
    before = certificate.read_bytes()
    if fault is not aged:
        fault(tmp_path, monkeypatch)
    self_signed(tmp_path, ["localhost"])
    assert certificate.read_bytes() != before
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert shake_hands(certificate, key, "localhost", certificate) == "TLSv1.3"


@pytest.mark.parametrize("host", ["", "https://localhost", "localhost:8000", "a b", "a..b", "ü" * 80])
def test_what_is_no_host_is_refused(tmp_path, host):
    with pytest.raises(ConfigError, match="no name of a host"):
        self_signed(tmp_path, [host])
    with pytest.raises(ConfigError, match="one host at least"):
        self_signed(tmp_path, [])


def test_a_folder_that_is_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "tls").write_text("")
    with pytest.raises(DataError, match="cannot keep a certificate"):
        self_signed(tmp_path / "tls", ["localhost"])
