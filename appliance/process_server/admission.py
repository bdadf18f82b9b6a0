"""Who may send: asked for each request, so that what changes holds on open connections too.

A machine's certificate names it (common name). One from the config server says in its
organizational unit what its node is, and only a machine may send: the certificate of a process
server or an applier, which the same CA has signed, opens no stream.

Source: FORMAT.md §9; docs/CONTROL.md §3.
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from appliance.process_server.refusal import Kind, RefusedError
from replication.control.role import NodeRole


@dataclass(frozen=True, slots=True)
class Shown:
    """What a client's certificate says of it.

    names, roles: all common names and organizational units of its subject.
    serial:       0 where there is no certificate.
    """

    names: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    serial: int = 0

    @classmethod
    def of(cls, certificate: Mapping[str, Any] | None) -> "Shown":
        """From what ``SSLSocket.getpeercert`` tells."""
        if not certificate:
            return cls()
        subject = [pair for part in certificate.get("subject", ()) for pair in part]
        return cls(
            names=tuple(str(value) for key, value in subject if key == "commonName"),
            roles=tuple(str(value) for key, value in subject if key == "organizationalUnitName"),
            serial=int(str(certificate.get("serialNumber", "0")), 16),
        )


class Admission:
    """The machines that may send, and the certificates that are good no more.

    machines:     None: every machine that has a certificate of the CA.
    from_control: whether all certificates come from a config server, and so name a role.
    """

    def __init__(self, machines: Iterable[uuid.UUID] | None, *, from_control: bool = False) -> None:
        self.machines = None if machines is None else frozenset(machines)
        self._from_control = from_control
        self._revoked: frozenset[int] = frozenset()

    def follow(self, machines: Iterable[uuid.UUID], revoked: Iterable[str]) -> None:
        """Take over what the config server says; ``revoked`` are serials in hexadecimal."""
        self._revoked = frozenset(int(serial, 16) for serial in revoked)
        self.machines = frozenset(machines)

    def check(self, shown: Shown, machine: uuid.UUID) -> None:
        """Raise RefusedError unless who shows this certificate may use ``machine``'s stream."""
        if shown.serial in self._revoked:
            raise RefusedError(
                Kind.REVOKED,
                f"the certificate {shown.serial:x} is revoked",
                hint="enrol the machine again, if it is to be trusted again",
            )
        name = shown.names[0] if len(shown.names) == 1 else ""
        if name != str(machine):
            raise RefusedError(
                Kind.FORBIDDEN,
                f"the certificate is of {name!r:.80}: it may not touch the stream of {machine}",
                hint="each machine has its own: `enrol`, or `understudy pki issue --machine UUID`",
            )
        allowed = (
            [(NodeRole.MACHINE.value,)] if self._from_control else [(NodeRole.MACHINE.value,), ()]
        )
        if shown.roles not in allowed:
            raise RefusedError(
                Kind.FORBIDDEN,
                f"the certificate is of the role {', '.join(shown.roles)!r:.80}, not of a machine",
                hint="enrol the mobility agent; other nodes' certificates open no stream",
            )
        if self.machines is not None and machine not in self.machines:
            raise RefusedError(
                Kind.FORBIDDEN,
                f"machine {machine} is not among those that this server takes",
                hint="protect it with this process server, or add it to `machines` in its"
                " configuration",
            )
