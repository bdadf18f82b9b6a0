"""Who a node is, in a folder: what it enrolled as, its key and certificate, the CA.

    node.json        id, role and name; written once, before the first word to a config server
    node.pem         private key and certificate in one file: one rename switches both
    ca.pem           whom it trusts
    pending-key.pem  a key whose certificate has been asked for and is not here yet
    assignment.json  the newest assignment
    data-keys/       data keys that were fetched, one file each

All files are of mode 0600. A process that is killed at any instruction leaves a usable pair, or,
while it enrols, the id and the key with which it asks again.

Source: docs/CONTROL.md §3.
"""

import contextlib
import datetime as dt
import os
import stat
import uuid
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from daemon.certificates import (
    CLOCK_SKEW,
    certificate_pem,
    key_pem,
    name_part,
    new_key,
    read_certificate,
    read_key,
    serial_text,
    utc_now,
)
from daemon.durable import make_folder, storage_error, sync_folder, write_whole
from daemon.tls import TlsFiles
from replication.control.message import Message
from replication.control.role import NodeRole
from replication.errors import ConfigError, PeerError

NODE_FILE = "node.json"
PAIR_FILE = "node.pem"
CA_FILE = "ca.pem"
PENDING_KEY_FILE = "pending-key.pem"
ASSIGNMENT_FILE = "assignment.json"
DATA_KEYS_FOLDER = "data-keys"
FILE_BYTES_MAX = 64 << 10
RENEWED_AT = 2 / 3
"""Of a certificate's life."""


class NodeRecord(Message):
    """``node.json``: chosen by the node once and kept."""

    id: uuid.UUID
    role: NodeRole
    name: str


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """An enrolled node.

    node:    its id; a machine's is its stream's.
    serial:  of its certificate, as ``serial_text`` writes it.
    begins, expires: of its certificate, UTC.
    """

    folder: str
    node: uuid.UUID
    role: NodeRole
    name: str
    serial: str
    begins: dt.datetime
    expires: dt.datetime

    @property
    def tls(self) -> TlsFiles:
        """For ``daemon.tls``: the paths stay the same when the certificate is renewed."""
        pair = os.path.join(self.folder, PAIR_FILE)
        return TlsFiles(certificate=pair, key=pair, ca=os.path.join(self.folder, CA_FILE))

    @property
    def renewal_due(self) -> dt.datetime:
        begins = self.begins + CLOCK_SKEW
        return begins + (self.expires - begins) * RENEWED_AT

    @property
    def is_expired(self) -> bool:
        return utc_now() >= self.expires


def load(folder: str) -> NodeIdentity:
    """Who is enrolled in ``folder``; ConfigError when nobody is, or the files do not fit."""
    hint = "enrol this node: run the daemon's command with `enrol --passphrase-file FILE`"
    try:
        record = read_record(folder)
        pair = read_private(os.path.join(folder, PAIR_FILE))
    except FileNotFoundError:
        record = None
    if record is None:
        raise ConfigError(f"nobody is enrolled in {folder}", hint=hint)
    path = os.path.join(folder, PAIR_FILE)
    key = read_key(pair, path)
    try:
        certificate = read_certificate(pair)
    except PeerError as error:
        raise ConfigError(f"{path}: {error}", hint=hint) from error
    identity = NodeIdentity(
        folder,
        record.id,
        record.role,
        record.name,
        serial_text(certificate.serial_number),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )
    check_fits(certificate, key, record)
    return identity


def is_enrolled(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, PAIR_FILE))


def check_fits(
    certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, record: NodeRecord
) -> None:
    """Raise ConfigError unless the certificate is for this key and this node."""
    if certificate.public_key() != key.public_key():
        raise ConfigError(f"the certificate of {record.name} is not for its key")
    common_name = name_part(certificate.subject, NameOID.COMMON_NAME)
    unit = name_part(certificate.subject, NameOID.ORGANIZATIONAL_UNIT_NAME)
    if (common_name, unit) != (str(record.id), record.role.value):
        raise ConfigError(
            f"a certificate for {record.role.value} {record.id} was expected, "
            f"it is for {unit!r:.80} {common_name!r:.80}"
        )


def read_record(folder: str) -> NodeRecord | None:
    """What ``node.json`` says; None when there is none."""
    path = os.path.join(folder, NODE_FILE)
    try:
        return NodeRecord.model_validate_json(read_private(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(
            f"{path} does not say who this node is",
            hint="restore it from a backup; without it enrol under a new id: move the folder away",
        ) from error


def choose_record(folder: str, wanted: NodeRecord) -> NodeRecord:
    """Keep ``wanted`` unless an id was chosen before; the name is the newest one.

    Raises ConfigError when the folder is that of another role, or of a node with another id.
    """
    make_folder(folder)
    found = read_record(folder)
    if found is not None and found.role is not wanted.role:
        raise ConfigError(
            f"{folder} is an identity of the role {found.role.value}, not {wanted.role.value}",
            hint="give each daemon an identity folder of its own",
        )
    if found != wanted:
        write_whole(os.path.join(folder, NODE_FILE), wanted.model_dump_json().encode())
    return wanted


def pending_key(folder: str) -> ec.EllipticCurvePrivateKey:
    """The key to ask a certificate for: always the same until one has come."""
    path = os.path.join(folder, PENDING_KEY_FILE)
    with contextlib.suppress(FileNotFoundError):
        return read_key(read_private(path), path)
    key = new_key()
    write_whole(path, key_pem(key))
    return key


def drop_pending_key(folder: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, PENDING_KEY_FILE))
    sync_folder(folder)


def take_certificate(
    folder: str, record: NodeRecord, certificate: x509.Certificate, ca: x509.Certificate
) -> NodeIdentity:
    """Switch to a new certificate for the pending key; ConfigError when it is not for that."""
    key = pending_key(folder)
    check_fits(certificate, key, record)
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ConfigError("the certificate is not signed by the CA that came with it") from error
    write_whole(os.path.join(folder, CA_FILE), certificate_pem(ca))
    write_whole(os.path.join(folder, PAIR_FILE), key_pem(key) + certificate_pem(certificate))
    drop_pending_key(folder)
    return load(folder)


def read_private(path: str) -> bytes:
    """A small file that must be its owner's alone.

    Raises FileNotFoundError when it is missing, ConfigError when others may read it, StorageError.
    """
    try:
        with open(path, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigError(f"{path} can be read by others", hint=f"chmod 600 {path}")
            return file.read(FILE_BYTES_MAX)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise storage_error("read", path, error) from error
