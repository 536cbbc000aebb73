"""A certificate of one's own, for trying out, and for devices that are given it to trust.

It names its hosts, is no authority, and so vouches for nothing but itself: give it to clients as what they trust
(``--ca``). Where names are public, a certificate of a public authority is better.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from orchestrator.errors import ConfigError, DataError
from serve.private_files import read_private, write_private

CERTIFICATE: Final = "self-signed.crt"
KEY: Final = "self-signed.key"

_LASTS: Final = timedelta(days=397)
_RENEWED_BEFORE: Final = timedelta(days=14)
_CLOCKS_DIFFER: Final = timedelta(days=1)
"""A certificate is valid from so long ago: small devices start with the time of their last shutdown."""


def self_signed(folder: Path, hosts: Sequence[str]) -> tuple[Path, Path]:
    """The PEM files (certificate, key) in ``folder``, for all of ``hosts``: names and IP addresses.

    The one that is there is used again while it is for these hosts, fits its key and is valid for two weeks more, so
    that clients who trust it go on. 0.0.0.0 and :: stand for this machine's name. Raises `ConfigError` for what is no
    host, `DataError` if the files cannot be written.
    """
    wanted = _names(hosts)
    certificate, key = folder / CERTIFICATE, folder / KEY
    with _alone(folder):
        if not _is_good(certificate, key, wanted, datetime.now(UTC)):
            _make(certificate, key, wanted, datetime.now(UTC))
    return certificate, key


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    if not hosts:
        raise ConfigError("a certificate needs the name or the address of one host at least")
    return list(dict.fromkeys(_name(host.strip().strip("[]")) for host in hosts))


def _name(host: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return x509.DNSName(socket.gethostname()) if address.is_unspecified else x509.IPAddress(address)
    try:
        name = host.encode("idna").decode().lower()
    except UnicodeError as error:
        raise ConfigError(f"{host!r} is no name of a host") from error
    if not name or not all(part and set(part) <= _LETTERS for part in name.removeprefix("*.").split(".")):
        raise ConfigError(f"{host!r} is no name of a host: give a name or an IP address, without scheme and port")
    return x509.DNSName(name)


_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")


def _is_good(certificate: Path, key: Path, wanted: Sequence[x509.GeneralName], now: datetime) -> bool:
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        own = serialization.load_pem_private_key(read_private(key, what="the key of the certificate"), password=None)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, TypeError, DataError, x509.ExtensionNotFound):
        return False
    return (
        found.public_key() == own.public_key()
        and set(wanted) <= set(names)
        and found.not_valid_before_utc <= now < found.not_valid_after_utc - _RENEWED_BEFORE
    )


def _make(certificate: Path, key: Path, names: Sequence[x509.GeneralName], now: datetime) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    public = private.public_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "MetaMorphosis")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    usage = x509.KeyUsage(
        digital_signature=True,
        **dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False),
        **dict.fromkeys(("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"), False),
    )
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + _LASTS)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(private, hashes.SHA256())
    )
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_private(key, pem, what="the key of the certificate", replace=True)
    write_private(
        certificate, made.public_bytes(serialization.Encoding.PEM), what="the self-signed certificate", replace=True
    )
    certificate.chmod(0o644)  # the certificate is for everybody


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, so that nobody is given the certificate of one key and the key of another."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DataError(f"cannot keep a certificate in {folder}: {error.strerror or error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
