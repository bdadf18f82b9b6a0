"""The private CA that makes agents and appliances known to each other.

A folder holds its certificate and its key. A machine's certificate bears the machine's UUID as
common name and may only be a client; a server's bears names and addresses and may be both, since
the parts of an appliance also call each other. Nothing is ever overwritten: a key that somebody
trusts would be gone.
"""

import datetime as dt
import os
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509

from daemon.certificates import (
    CLIENT,
    COMMON_NAME_CHARS_MAX,
    SERVER,
    Issuer,
    certificate_pem,
    key_pem,
    new_key,
    read_certificate,
    read_key,
    subject,
)
from daemon.durable import make_folder, write_new
from replication.envelope import DATA_KEY_BYTES
from replication.errors import ConfigError, PeerError

CERTIFICATE_FILE = "certificate.pem"
KEY_FILE = "key.pem"
CA_FILE = "ca.pem"
CA_LIFETIME = dt.timedelta(days=10 * 365)
ISSUED_LIFETIME = dt.timedelta(days=5 * 365)


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

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer

    @classmethod
    def create(cls, folder: str) -> Issued:
        """Make a new CA in ``folder``; ConfigError when one is there."""
        issuer = Issuer.create("Understudy CA", CA_LIFETIME)
        certificate = certificate_pem(issuer.certificate)
        _write_folder(folder, ((KEY_FILE, key_pem(issuer.key)), (CERTIFICATE_FILE, certificate)))
        return Issued(folder, "Understudy CA", issuer.certificate.not_valid_after_utc)

    @classmethod
    def open(cls, folder: str) -> "Authority":
        """Raise ConfigError when there is no usable CA in ``folder``."""
        certificate_path = os.path.join(folder, CERTIFICATE_FILE)
        key_path = os.path.join(folder, KEY_FILE)
        try:
            with open(certificate_path, "rb") as file:
                certificate = read_certificate(file.read())
            with open(key_path, "rb") as file:
                key = read_key(file.read(), key_path)
        except (OSError, PeerError, ConfigError) as error:
            raise ConfigError(
                f"there is no usable certificate authority in {folder}: {error}",
                hint=f"make one with `understudy pki init {folder}`",
            ) from error
        if key.public_key() != certificate.public_key():
            raise ConfigError(f"{key_path} is not the key of {certificate_path}")
        return cls(Issuer(certificate, key))

    def issue_machine(self, machine: uuid.UUID, folder: str) -> Issued:
        """A client certificate that lets an agent send the stream of ``machine``."""
        return self._issue(str(machine), (), (CLIENT,), folder)

    def issue_server(self, names: Sequence[str], folder: str) -> Issued:
        """A certificate for a server that is reached under ``names`` (DNS names, addresses)."""
        if not names:
            raise ConfigError("a server's certificate needs at least one name or address")
        return self._issue(names[0][:COMMON_NAME_CHARS_MAX], names, (SERVER, CLIENT), folder)

    def _issue(
        self,
        common_name: str,
        names: Sequence[str],
        usages: Sequence[x509.ObjectIdentifier],
        folder: str,
    ) -> Issued:
        key = new_key()
        certificate = self._issuer.issue(
            subject(common_name),
            key.public_key(),
            usages=usages,
            names=names,
            lifetime=ISSUED_LIFETIME,
        )
        _write_folder(
            folder,
            (
                (KEY_FILE, key_pem(key)),
                (CERTIFICATE_FILE, certificate_pem(certificate)),
                (CA_FILE, certificate_pem(self._issuer.certificate)),
            ),
        )
        return Issued(folder, common_name, certificate.not_valid_after_utc)


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
    try:
        write_new(path, content, mode=mode)
    except FileExistsError as error:
        raise _exists(path) from error


def _refuse_existing(path: str) -> None:
    if os.path.lexists(path):
        raise _exists(path)


def _exists(path: str) -> ConfigError:
    return ConfigError(
        f"{path} is there already and is not overwritten",
        hint="choose another place, or move the old one away if nobody needs it",
    )
