"""Whom a connection's client certificate names. TLS has checked it against our CA by then."""

import uuid
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID
from starlette.requests import HTTPConnection

from daemon.certificates import name_part, names_of, serial_text
from replication.control.role import NodeRole

SCOPE_KEY = "peer"


@dataclass(frozen=True, slots=True)
class Peer:
    """A node as its certificate has it. ``serial`` is in hexadecimal, as in the database.

    names: DNS names and addresses that it may serve under; a process server has some.
    """

    node: uuid.UUID
    role: NodeRole
    serial: str
    names: tuple[str, ...] = ()

    @classmethod
    def of_certificate(cls, der: bytes) -> "Peer | None":
        """Whom a certificate names; none when it names no node, as a server's own does not."""
        certificate = x509.load_der_x509_certificate(der)
        try:
            return cls(
                uuid.UUID(name_part(certificate.subject, NameOID.COMMON_NAME)),
                NodeRole(name_part(certificate.subject, NameOID.ORGANIZATIONAL_UNIT_NAME)),
                serial_text(certificate.serial_number),
                names_of(certificate),
            )
        except ValueError:
            return None


def peer_of(request: HTTPConnection) -> Peer | None:
    """Who is at the other end, if the connection showed a certificate of a node."""
    peer = request.scope.get("state", {}).get(SCOPE_KEY)
    assert peer is None or isinstance(peer, Peer)
    return peer


def state_with(peer: Peer | None) -> dict[str, Any]:
    """What a connection hands to each of its requests."""
    return {SCOPE_KEY: peer}
