"""Nodes' certificates: who gets one, who gets the next, and what is good no more.

A node's row is locked while one of its certificates is issued or revoked: none slips through.
"""

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.store.schema import Certificate, Node
from daemon.certificates import (
    CLIENT,
    SERVER,
    Issuer,
    SigningRequest,
    key_digest,
    serial_text,
    subject,
)
from replication.control.enrolment import CertificateRequest
from replication.control.role import NodeRole
from replication.errors import (
    ConflictError,
    InputError,
    LimitError,
    NotFoundError,
    UnknownCallerError,
)

LIVE_CERTIFICATES_MAX = 16
"""Of one node at once: each renewal leaves the old one to end by itself."""

_NS = 10**9


class KeyRevokedError(ConflictError):
    """A certificate of this key was revoked; whoever has the key must not get another one."""

    code = "key_revoked"


@dataclass(frozen=True, slots=True)
class CertificateAuthority:
    """Issues nodes' certificates and keeps account of them."""

    issuer: Issuer
    lifetime: dt.timedelta

    async def enrol(
        self,
        session: AsyncSession,
        request: CertificateRequest,
        signing_request: SigningRequest,
        now_ns: int,
    ) -> x509.Certificate:
        """Take up a node, or take it up again. Its proof has been checked.

        Raises ConflictError when the id is another role's or enrolled with another key,
        KeyRevokedError, InputError for names that will not do.
        """
        node = await _locked(session, request.node)
        if node is None:
            node = Node(
                id=request.node,
                role=request.role,
                name=request.name,
                bios_uuid=request.bios_uuid,
                enrolled_ns=now_ns,
            )
            session.add(node)
            await session.flush()
        elif node.role != request.role:
            raise ConflictError(
                f"{request.node} is enrolled as {node.role}",
                hint="give this node an id and an identity folder of its own",
            )
        await self._refuse_other_key(session, node, key_digest(signing_request.public_key), now_ns)
        node.name, node.bios_uuid = request.name, request.bios_uuid
        if request.role is NodeRole.PROCESS_SERVER and not request.names:
            raise InputError("names: a process server has at least one name or address")
        names = request.names if request.role is NodeRole.PROCESS_SERVER else ()
        return await self._issue(session, node, signing_request, names, now_ns)

    async def renew(
        self,
        session: AsyncSession,
        serial: str,
        signing_request: SigningRequest,
        names: Sequence[str],
        now_ns: int,
    ) -> x509.Certificate:
        """The next certificate for the holder of ``serial``.

        names: those of the certificate that is shown.
        Raises UnknownCallerError when that was revoked meanwhile.
        """
        shown = await session.get(Certificate, serial)
        assert shown is not None, "the caller was let in with it"
        node = await _locked(session, shown.node_id)
        assert node is not None
        await session.refresh(shown)
        if shown.revoked_ns is not None:
            raise UnknownCallerError(f"the certificate {serial} is revoked")
        return await self._issue(session, node, signing_request, names, now_ns)

    async def _issue(
        self,
        session: AsyncSession,
        node: Node,
        signing_request: SigningRequest,
        names: Sequence[str],
        now_ns: int,
    ) -> x509.Certificate:
        digest = key_digest(signing_request.public_key)
        await _refuse_revoked_key(session, digest)
        if len(await _live(session, node.id, now_ns)) >= LIVE_CERTIFICATES_MAX:
            raise LimitError(
                f"{node.name} has {LIVE_CERTIFICATES_MAX} certificates already",
                hint="revoke the node's certificates, then enrol it again",
                retry_after_seconds=3600,
            )
        usages = (SERVER, CLIENT) if names else (CLIENT,)
        certificate = self.issuer.issue(
            subject(str(node.id), node.role),
            signing_request.public_key,
            usages=usages,
            lifetime=self.lifetime,
            names=names,
        )
        session.add(
            Certificate(
                serial=serial_text(certificate.serial_number),
                node_id=node.id,
                key_digest=digest,
                issued_ns=now_ns,
                expires_ns=int(certificate.not_valid_after_utc.timestamp()) * _NS,
            )
        )
        await session.flush()
        return certificate

    async def _refuse_other_key(
        self, session: AsyncSession, node: Node, digest: str, now_ns: int
    ) -> None:
        live = await _live(session, node.id, now_ns)
        if live and digest not in {each.key_digest for each in live}:
            raise ConflictError(
                f"{node.role} {node.id} is enrolled with another key",
                hint="if it lost its identity folder, revoke its certificate first: "
                f"understudy certificates revoke {live[-1].serial}",
            )


async def revoke(
    session: AsyncSession, serial: str, *, by: str, now_ns: int
) -> tuple[Certificate, list[str]]:
    """Revoke a certificate and every other one that its node holds; fine if they are already.

    One that is stolen may have been renewed by the thief: the node as a whole is out until it
    enrols again. Returns the certificate asked for and the serials revoked now.
    Raises NotFoundError.
    """
    asked = await session.get(Certificate, serial)
    if asked is None:
        raise NotFoundError(f"there is no certificate {serial}", hint="list them: GET certificates")
    await _locked(session, asked.node_id)
    revoked = []
    for row in await _live(session, asked.node_id, now_ns):
        row.revoked_ns, row.revoked_by = now_ns, by
        revoked.append(row.serial)
    await session.flush()
    await session.refresh(asked)
    return asked, revoked


async def revoked_serials(session: AsyncSession, now_ns: int) -> tuple[str, ...]:
    """Of certificates that are revoked and have not ended by themselves."""
    found = select(Certificate.serial).where(
        Certificate.revoked_ns.is_not(None), Certificate.expires_ns > now_ns
    )
    return tuple(await session.scalars(found.order_by(Certificate.serial)))


async def _locked(session: AsyncSession, node: uuid.UUID) -> Node | None:
    return await session.scalar(select(Node).where(Node.id == node).with_for_update())


async def _live(session: AsyncSession, node: uuid.UUID, now_ns: int) -> list[Certificate]:
    found = select(Certificate).where(
        Certificate.node_id == node,
        Certificate.revoked_ns.is_(None),
        Certificate.expires_ns > now_ns,
    )
    ordered = found.order_by(Certificate.issued_ns).execution_options(populate_existing=True)
    return list(await session.scalars(ordered))


async def _refuse_revoked_key(session: AsyncSession, digest: str) -> None:
    found = select(Certificate.serial).where(
        Certificate.key_digest == digest, Certificate.revoked_ns.is_not(None)
    )
    if await session.scalar(found.limit(1)) is not None:
        raise KeyRevokedError(
            "a certificate of this key was revoked", hint="enrol with a new key: `enrol --again`"
        )
