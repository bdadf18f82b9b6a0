"""The private CA that makes agents and appliances known to each other.

A folder holds its certificate and its key. A machine's certificate bears the machine's UUID as
common name and may only be a client; a server's bears names and addresses and may be both, since
the parts of an appliance also call each other. Nothing is ever overwritten: a key that somebody
trusts would be gone.
"""

import contextlib
import datetime as dt
import ipaddress
import os
import secrets
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from daemon.durable import make_folder, storage_error, sync_folder
from replication.envelope import DATA_KEY_BYTES
from replication.errors import ConfigError

CERTIFICATE_FILE = "certificate.pem"
KEY_FILE = "key.pem"
CA_FILE = "ca.pem"
CA_YEARS = 10
ISSUED_YEARS = 5
_CLOCK_SKEW = dt.timedelta(hours=1)
_COMMON_NAME_CHARS_MAX = 64


@dataclass(frozen=True, slots=True)
class Issued:
    """Where a new certificate lies.

    subject: its common name.
    expires: until when it is good.
    """

    folder: str
    subject: str
    expires: dt.datetime


class Authority:
    """The CA in a folder: ``certificate.pem`` and ``key.pem``."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, folder: str) -> Issued:
        """Make a new CA in ``folder``; ConfigError when one is there."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("Understudy CA")
        expires = _now() + _years(CA_YEARS)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _builder(name, name, key, expires)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        _write_folder(folder, ((KEY_FILE, _key_pem(key)), (CERTIFICATE_FILE, _pem(certificate))))
        return Issued(folder, "Understudy CA", expires)

    @classmethod
    def open(cls, folder: str) -> "Authority":
        """Raise ConfigError when there is no usable CA in ``folder``."""
        certificate_path = os.path.join(folder, CERTIFICATE_FILE)
        key_path = os.path.join(folder, KEY_FILE)
        try:
            with open(certificate_path, "rb") as file:
                certificate = x509.load_pem_x509_certificate(file.read())
            with open(key_path, "rb") as file:
                key = serialization.load_pem_private_key(file.read(), password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(
                f"there is no usable certificate authority in {folder}: {error}",
                hint=f"make one with `understudy pki init {folder}`",
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{key_path}: an elliptic-curve key was expected")
        if key.public_key() != certificate.public_key():
            raise ConfigError(f"{key_path} is not the key of {certificate_path}")
        return cls(certificate, key)

    def issue_machine(self, machine: uuid.UUID, folder: str) -> Issued:
        """A client certificate that lets an agent send the stream of ``machine``."""
        return self._issue(str(machine), [], [ExtendedKeyUsageOID.CLIENT_AUTH], folder)

    def issue_server(self, names: Sequence[str], folder: str) -> Issued:
        """A certificate for a server that is reached under ``names`` (DNS names, addresses)."""
        if not names:
            raise ConfigError("a server's certificate needs at least one name or address")
        alternatives = [_alternative(name) for name in names]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return self._issue(names[0][:_COMMON_NAME_CHARS_MAX], alternatives, usages, folder)

    def _issue(
        self,
        subject: str,
        alternatives: Sequence[x509.GeneralName],
        usages: Iterable[x509.ObjectIdentifier],
        folder: str,
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        expires = min(_now() + _years(ISSUED_YEARS), self._certificate.not_valid_after_utc)
        own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            _builder(_name(subject), self._certificate.subject, key, expires)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(own, critical=False)
            .add_extension(issuer, critical=False)
        )
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        certificate = builder.sign(self._key, hashes.SHA256())
        _write_folder(
            folder,
            (
                (KEY_FILE, _key_pem(key)),
                (CERTIFICATE_FILE, _pem(certificate)),
                (CA_FILE, _pem(self._certificate)),
            ),
        )
        return Issued(folder, subject, expires)


def create_data_key(path: str) -> None:
    """Make a machine's data key: 64 hexadecimal digits and a line end, mode 0600."""
    make_folder(os.path.dirname(os.path.abspath(path)))
    _write_new(path, secrets.token_hex(DATA_KEY_BYTES).encode() + b"\n", 0o600)


def _write_folder(folder: str, files: Sequence[tuple[str, bytes]]) -> None:
    for name, _ in files:
        _refuse_existing(os.path.join(folder, name))
    make_folder(folder)
    for name, content in files:
        mode = 0o600 if name == KEY_FILE else 0o644
        _write_new(os.path.join(folder, name), content, mode)


def _write_new(path: str, content: bytes, mode: int) -> None:
    """Write ``path`` whole or not at all, and never over what is there."""
    pending = f"{path}.{secrets.token_hex(4)}.new"
    try:
        fd = os.open(pending, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(content)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.link(pending, path)  # a rename would replace a file that came in between
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise storage_error("write", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(pending)
    sync_folder(os.path.dirname(path) or ".")


def _refuse_existing(path: str) -> None:
    if os.path.lexists(path):
        raise _exists(path)


def _exists(path: str) -> ConfigError:
    return ConfigError(
        f"{path} is there already and is not overwritten",
        hint="choose another place, or move the old one away if nobody needs it",
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    labels = name.split(".")
    if not name.isascii() or len(name) > 253 or not all(_is_label(label) for label in labels):
        raise ConfigError(f"{name!r} is neither a DNS name nor an IP address")
    return x509.DNSName(name)


def _is_label(label: str) -> bool:
    return 0 < len(label) <= 63 and label.replace("-", "").replace("_", "").isalnum()


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    expires: dt.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _CLOCK_SKEW)
        .not_valid_after(expires)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC).replace(microsecond=0)


def _years(count: int) -> dt.timedelta:
    return dt.timedelta(days=365 * count)
