"""Whom a connection's client certificate names. TLS has checked it against our CA by then."""

import uuid
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID
from starlette.requests import HTTPConnection

from replication.control.role import NodeRole

SCOPE_KEY = "peer"


@dataclass(frozen=True, slots=True)
class Peer:
    """A node as its certificate has it. ``serial`` is in hexadecimal, as in the database."""

    node: uuid.UUID
    role: NodeRole
    serial: str

    @classmethod
    def of_certificate(cls, der: bytes) -> "Peer | None":
        """Whom a certificate names; none when it names no node, as a server's own does not."""
        certificate = x509.load_der_x509_certificate(der)
        try:
            (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            (unit,) = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
            return cls(
                uuid.UUID(str(name.value)),
                NodeRole(str(unit.value)),
                serial_text(certificate.serial_number),
            )
        except ValueError:
            return None


def serial_text(serial: int) -> str:
    """How a serial number is written wherever it is written."""
    return f"{serial:x}"


def peer_of(request: HTTPConnection) -> Peer | None:
    """Who is at the other end, if the connection showed a certificate of a node."""
    peer = request.scope.get("state", {}).get(SCOPE_KEY)
    assert peer is None or isinstance(peer, Peer)
    return peer


def state_with(peer: Peer | None) -> dict[str, Any]:
    """What a connection hands to each of its requests."""
    return {SCOPE_KEY: peer}
