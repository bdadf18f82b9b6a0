import contextlib
import datetime as dt
import os
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from daemon.tls import TlsFiles, client_context, server_context
from replication.errors import ConfigError


class Authority:
    """A private CA of the test's own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(name, self.key.public_key(), is_ca=True)
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def issue(self, name: str, *, trusted: "Authority | None" = None) -> TlsFiles:
        """A certificate for ``name``; its owner trusts ``trusted`` (this CA by default)."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(name, key.public_key(), is_ca=False)
        base = self.folder / f"{self.name}-{name}"
        base.with_suffix(".crt").write_bytes(certificate.public_bytes(Encoding.PEM))
        base.with_suffix(".key").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        base.with_suffix(".key").chmod(0o600)
        return TlsFiles(
            certificate=str(base.with_suffix(".crt")),
            key=str(base.with_suffix(".key")),
            ca=str((trusted or self).path),
        )

    def _sign(self, name: str, key: ec.EllipticCurvePublicKey, *, is_ca: bool) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=is_ca, crl_sign=is_ca, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        return (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(self.name))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(usage, critical=True)
            .sign(self.key, hashes.SHA256())
        )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def talk(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "server") -> str:
    """Shake hands over a socket pair; return the client's name as the server sees it."""
    ours, theirs = socket.socketpair()
    seen: list[str] = []

    def answer() -> None:
        with contextlib.suppress(OSError), server.wrap_socket(theirs, server_side=True) as channel:
            peer = channel.getpeercert()
            assert peer
            seen.append(str(peer["subject"][0][0][1]))
            channel.sendall(b"welcome")
        theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        ours.settimeout(5)
        with client.wrap_socket(ours, server_hostname=name) as channel:
            assert channel.version() == "TLSv1.3"
            # With TLS 1.3 a client learns only here that its certificate was refused.
            if channel.recv(100) != b"welcome":
                raise ConnectionResetError
    finally:
        ours.close()
        thread.join(10)
    return seen[0]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ca")


def test_both_sides_know_each_other(authority: Authority) -> None:
    server = server_context(authority.issue("server"))
    client = client_context(authority.issue("machine-1"))
    assert talk(server, client) == "machine-1"


def test_client_without_certificate_is_refused(authority: Authority) -> None:
    anonymous = ssl.create_default_context(cafile=str(authority.path))
    with pytest.raises(OSError, match=r"(?i)certificate.required|reset|closed|EOF"):
        talk(server_context(authority.issue("server")), anonymous)


def test_client_of_another_ca_is_refused(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "other").issue("machine-1", trusted=authority)
    with pytest.raises(OSError):
        talk(server_context(authority.issue("server")), client_context(stranger))


def test_server_of_another_ca_or_name_is_refused(authority: Authority, tmp_path: Path) -> None:
    client = client_context(authority.issue("machine-1"))
    impostor = Authority(tmp_path, "other").issue("server", trusted=authority)
    with pytest.raises(ssl.SSLCertVerificationError):
        talk(server_context(impostor), client)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        talk(server_context(authority.issue("server")), client, "elsewhere")


def test_older_tls_is_refused(authority: Authority) -> None:
    older = client_context(authority.issue("machine-1"))
    older.minimum_version = ssl.TLSVersion.TLSv1_2
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError):
        talk(server_context(authority.issue("server")), older)


def test_unusable_files_are_told(authority: Authority, tmp_path: Path) -> None:
    good, other = authority.issue("one"), authority.issue("two")
    empty = tmp_path / "empty.pem"
    empty.touch()
    for files in (
        good.model_copy(update={"certificate": str(tmp_path / "gone")}),
        good.model_copy(update={"key": other.key}),
        good.model_copy(update={"ca": str(empty)}),
    ):
        for make in (server_context, client_context):
            with pytest.raises(ConfigError, match="cannot use certificate"):
                make(files)


def test_key_that_everyone_can_read_is_refused(authority: Authority) -> None:
    files = authority.issue("server")
    os.chmod(files.key, 0o640)
    server_context(files)
    for mode in (0o644, 0o602):
        os.chmod(files.key, mode)
        for make in (server_context, client_context):
            with pytest.raises(ConfigError, match="everyone on this machine"):
                make(files)
