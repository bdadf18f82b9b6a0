"""How a daemon enrols: it proves the passphrase, checks that the config server knows it as well,
and gets a certificate. Safe to be killed and run again at any point.

A daemon's ``main`` wires it in with two calls::

    parser.add_argument("action", nargs="?", choices=("run", "enrol"), default="run")
    add_enrol_options(parser)
    options = parser.parse_args()
    if options.action == "enrol":
        return enrol_command(options, config.control, NodeRole.APPLIER)

Source: docs/CONTROL.md §3.
"""

import argparse
import asyncio
import hmac
import secrets
import socket
import sys
import uuid
from collections.abc import Sequence

from daemon.certificates import SigningRequest, certificate_der, read_certificate, signing_request
from daemon.control_call import RefusedError, calls_to, parse, proved_context, unproved_context
from daemon.control_config import ControlConfig
from daemon.identity import (
    NodeIdentity,
    NodeRecord,
    choose_record,
    drop_pending_key,
    is_enrolled,
    load,
    pending_key,
    read_private,
    read_record,
    take_certificate,
)
from daemon.ownership import act_as_owner
from daemon.service import fail
from replication.control.enrolment import (
    NONCE_BYTES,
    CertificateRequest,
    Challenge,
    ChallengeRequest,
    Enrolled,
    PassphraseKind,
    client_proof,
    derive_key,
    server_proof,
)
from replication.control.role import NodeRole
from replication.errors import ConfigError, PeerError, ReplicationError

KEY_REVOKED = "key_revoked"
"""The config server's code for a request with a key whose certificate was revoked."""

PASSPHRASE_BYTES_MAX = 4096


async def enrol(
    config: ControlConfig,
    passphrase: str,
    role: NodeRole,
    *,
    name: str,
    names: Sequence[str] = (),
    node: uuid.UUID | None = None,
    bios_uuid: uuid.UUID | None = None,
    again: bool = False,
) -> NodeIdentity:
    """Enrol with the config server and write the identity folder; returns who this node is now.

    node:      its id, which a machine brings along; without one the id that was chosen before
               stays, or a new one is chosen and kept.
    names:     DNS names and addresses under which a process server is reached.
    bios_uuid: by which a machine is matched to a discovered VM.
    again:     enrol although this node is enrolled (its certificate was revoked, or it goes to
               another config server).

    Raises ConfigError (already enrolled; a folder of another node), PeerError (the server does not
    know the passphrase), RefusedError (it refuses us), UnavailableError, StorageError.
    """
    folder = config.identity_folder
    record = _record(folder, role, name, node)
    if is_enrolled(folder) and not again and not load(folder).is_expired:
        raise ConfigError(
            f"{folder} is enrolled already as {role.value} {record.id}",
            hint="certificates are renewed by themselves; after a revocation, or for another "
            "config server, give --again",
        )
    record = await asyncio.to_thread(choose_record, folder, record)
    try:
        return await _enrol(config, passphrase, record, names, bios_uuid)
    except RefusedError as error:
        if error.reason != KEY_REVOKED:
            raise
    # A key that was asked for long ago and revoked meanwhile: the next one is new.
    await asyncio.to_thread(drop_pending_key, folder)
    return await _enrol(config, passphrase, record, names, bios_uuid)


def _record(folder: str, role: NodeRole, name: str, node: uuid.UUID | None) -> NodeRecord:
    found = read_record(folder)
    if node is None:
        node = found.id if found else uuid.uuid4()
    elif found is not None and found.id != node:
        raise ConfigError(
            f"{folder} is the identity of {found.role.value} {found.id}, not of {node}",
            hint="give each node an identity folder of its own, or move that one away",
        )
    return NodeRecord(id=node, role=role, name=name)


async def _enrol(
    config: ControlConfig,
    passphrase: str,
    record: NodeRecord,
    names: Sequence[str],
    bios_uuid: uuid.UUID | None,
) -> NodeIdentity:
    folder = config.identity_folder
    key = await asyncio.to_thread(pending_key, folder)
    client_nonce = secrets.token_bytes(NONCE_BYTES)
    async with calls_to(config.config_server, unproved_context()) as calls:
        asked = ChallengeRequest(client_nonce=client_nonce.hex(), role=record.role)
        answer = await calls.ask("POST", "enrolment/challenges", body=asked)
    challenge = parse(Challenge, answer, "challenge")
    proof_key = await asyncio.to_thread(derive_key, passphrase, bytes.fromhex(challenge.salt))
    server_nonce = bytes.fromhex(challenge.server_nonce)
    ca = read_certificate(challenge.ca_pem)
    expected = server_proof(proof_key, client_nonce, server_nonce, certificate_der(ca), record.role)
    if not hmac.compare_digest(expected, bytes.fromhex(challenge.proof)):
        raise PeerError(
            f"{config.config_server} does not prove that it knows the enrolment passphrase of a "
            f"{record.role}",
            hint="is the passphrase the newest one (`understudy-config-server passphrase show "
            f"--for {PassphraseKind.of(record.role)}`)? If it is, somebody stands between: do not "
            "go on",
        )
    csr_pem = signing_request(key, str(record.id)).decode()
    request = CertificateRequest(
        challenge=challenge.challenge,
        role=record.role,
        node=record.id,
        name=record.name,
        names=tuple(names),
        bios_uuid=bios_uuid,
        csr_pem=csr_pem,
        proof="0" * 64,
    )
    csr_der = SigningRequest.read(csr_pem).der
    proof = client_proof(proof_key, client_nonce, server_nonce, csr_der, request)
    request = request.model_copy(update={"proof": proof.hex()})
    # From here on only a server with a certificate of the proved CA is spoken to.
    async with calls_to(config.config_server, proved_context(challenge.ca_pem)) as calls:
        answer = await calls.ask("POST", "enrolment/certificates", body=request)
    enrolled = parse(Enrolled, answer, "certificate")
    certificate = read_certificate(enrolled.certificate_pem)
    return await asyncio.to_thread(take_certificate, folder, record, certificate, ca)


def add_enrol_options(parser: argparse.ArgumentParser) -> None:
    """Add what the ``enrol`` action takes to a daemon's parser."""
    group = parser.add_argument_group("enrol")
    group.add_argument(
        "--passphrase-file",
        metavar="FILE",
        help="holds the enrolment passphrase for nodes of this kind, mode 0600; - reads it from "
        "standard input",
    )
    group.add_argument("--name", help="what people call this node; default: the host's name")
    group.add_argument(
        "--again", action="store_true", help="enrol although this node is enrolled already"
    )


def enrol_command(
    options: argparse.Namespace,
    config: ControlConfig | None,
    role: NodeRole,
    *,
    node: uuid.UUID | None = None,
    names: Sequence[str] = (),
    bios_uuid: uuid.UUID | None = None,
    name: str = "",
) -> int:
    """Do the ``enrol`` action of a daemon and return its exit code; tells what came of it.

    name: what this node is called unless ``--name`` says otherwise; empty: the host's name.
    """
    try:
        if config is None:
            raise ConfigError(
                "there is no [control] section: this daemon knows no config server",
                hint="give control.config_server and control.identity_folder",
            )
        if not options.passphrase_file:
            raise ConfigError("enrol needs --passphrase-file FILE")
        passphrase = read_passphrase(options.passphrase_file)
        act_as_owner(config.identity_folder)
        identity = asyncio.run(
            enrol(
                config,
                passphrase,
                role,
                name=options.name or name or socket.gethostname(),
                names=names,
                node=node,
                bios_uuid=bios_uuid,
                again=options.again,
            )
        )
    except ReplicationError as error:
        return fail(error)
    told = f"enrolled {role.value} {identity.node} ({identity.name})"
    print(f"{told} until {identity.expires:%F}")  # noqa: T201 - this is the user's terminal
    return 0


def read_passphrase(path: str) -> str:
    """What stands in ``path`` (standard input for ``-``); ConfigError when nothing does."""
    if path == "-":
        text = sys.stdin.read(PASSPHRASE_BYTES_MAX)
    else:
        try:
            text = read_private(path).decode()
        except FileNotFoundError as error:
            raise ConfigError(f"there is no passphrase file {path}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} holds no passphrase: it is no text") from error
    if not text.strip():
        raise ConfigError(f"{path} holds no passphrase")
    return text.strip()
