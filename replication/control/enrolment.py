"""Enrolment: both sides prove that they know the passphrase; nobody sends it.

The node asks for a challenge; the server's answer carries its CA and proves it; the node makes a
key and a signing request, and proves that. Both proofs are HMAC-SHA256 under a key that scrypt
derives from the passphrase of the node's role; each names its direction and binds the role and both
nonces, so that neither can be played back.

Source: docs/CONTROL.md §3; RFC 2104 (HMAC), RFC 7914 (scrypt), RFC 2986 (signing request).
"""

import hashlib
import hmac
import uuid
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from replication.control.message import Message
from replication.control.role import NodeRole

NONCE_BYTES = 32
SALT_BYTES = 16
PROOF_BYTES = 32
SCRYPT_COST = 1 << 14
SCRYPT_BLOCK = 8
SCRYPT_LANES = 1
PEM_CHARS_MAX = 16 << 10

Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Proof = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Salt = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Pem = Annotated[str, Field(max_length=PEM_CHARS_MAX)]
Name = Annotated[
    str, Field(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._@-]*$")
]
HostName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9:._-]+$")]


class PassphraseKind(StrEnum):
    """Whom an enrolment passphrase lets in.

    The one for machines is known on every machine that is protected. Whoever has it must not be
    able to take streams and data keys: the parts of the appliance have another one.
    """

    MACHINES = "machines"
    APPLIANCE = "appliance"

    @classmethod
    def of(cls, role: NodeRole) -> "PassphraseKind":
        """The one that a node of ``role`` proves."""
        return cls.MACHINES if role is NodeRole.MACHINE else cls.APPLIANCE


class ChallengeRequest(Message):
    """``POST /api/v1/enrolment/challenges``.

    role: of the node; it says under which passphrase's key both prove.
    """

    client_nonce: Nonce
    role: NodeRole


class Challenge(Message):
    """Its answer. Good for one use within a minute."""

    challenge: uuid.UUID
    server_nonce: Nonce
    salt: Salt
    ca_pem: Pem
    proof: Proof


class CertificateRequest(Message):
    """``POST /api/v1/enrolment/certificates``.

    node:      chosen by the node once and kept; a machine's is its id in the stream.
    names:     DNS names and addresses that a process server is reached under.
    bios_uuid: by which a machine is matched to a discovered VM.
    """

    challenge: uuid.UUID
    role: NodeRole
    node: uuid.UUID
    name: Name
    names: Annotated[tuple[HostName, ...], Field(max_length=32)] = ()
    bios_uuid: uuid.UUID | None = None
    csr_pem: Pem
    proof: Proof


class Enrolled(Message):
    """A certificate; the answer to enrolment and to renewal."""

    node: uuid.UUID
    certificate_pem: Pem
    ca_pem: Pem


class RenewalRequest(Message):
    """``POST /api/v1/node/certificate``, under the certificate that is to be renewed."""

    csr_pem: Pem


def derive_key(passphrase: str, salt: bytes) -> bytes:
    """The key of both proofs: 32 bytes. Takes some 50 ms on purpose.

    Case, dashes and spaces of the passphrase do not count: people copy it by hand.
    """
    told = "".join(char for char in passphrase.lower() if char.isalnum())
    return hashlib.scrypt(
        told.encode(),
        salt=salt,
        n=SCRYPT_COST,
        r=SCRYPT_BLOCK,
        p=SCRYPT_LANES,
        dklen=32,
    )


def server_proof(
    key: bytes, client_nonce: bytes, server_nonce: bytes, ca_der: bytes, role: NodeRole
) -> bytes:
    """That the CA is the one of whoever knows the passphrase of ``role``."""
    return _proof(key, b"server", role.encode(), client_nonce, server_nonce, ca_der)


def client_proof(
    key: bytes,
    client_nonce: bytes,
    server_nonce: bytes,
    csr_der: bytes,
    request: CertificateRequest,
) -> bytes:
    """That the signing request, and what is claimed beside it, comes from who knows it."""
    claims = request.model_copy(update={"proof": "", "csr_pem": ""}).model_dump_json().encode()
    return _proof(
        key, b"client", request.role.encode(), client_nonce, server_nonce, csr_der, claims
    )


def _proof(key: bytes, *parts: bytes) -> bytes:
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
