"""Nodes' certificates: who gets one, who gets the next, and what is good no more.

A node's row is locked while one of its certificates is issued or revoked: none slips through.
"""

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.identity.names import is_id, shared_name
from appliance.config_server.identity.passphrase import SETTINGS
from appliance.config_server.store.schema import Certificate, Node, Setting
from daemon.certificates import (
    CLIENT,
    SERVER,
    Issuer,
    SigningRequest,
    key_digest,
    serial_text,
    subject,
)
from replication.control.enrolment import CertificateRequest, PassphraseKind
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

NEW_KEY_SECONDS = 3600
"""So long the leave for a new key is good."""

_NS = 10**9


class NewKeyError(ConflictError):
    """A node that is known comes with a key that it never had, and nobody has allowed that."""

    code = "new_key"


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

        Raises ConflictError when the id is another role's or enrolled with another key, or when a
        name is another one's; NewKeyError for a known id with a new key that nobody allowed;
        KeyRevokedError; InputError for names that will not do.
        """
        await _one_at_a_time(session)
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
        else:
            digest = key_digest(signing_request.public_key)
            await _refuse_other_key(session, node, digest, now_ns)
        await _refuse_name(session, node, request.name, now_ns)
        node.name, node.bios_uuid = request.name, request.bios_uuid
        names = request.names if request.role is NodeRole.PROCESS_SERVER else ()
        if request.role is NodeRole.PROCESS_SERVER:
            await self._refuse_host_names(session, node, names, now_ns)
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
                names=list(names),
            )
        )
        await session.flush()
        return certificate

    async def _refuse_host_names(
        self, session: AsyncSession, node: Node, names: Sequence[str], now_ns: int
    ) -> None:
        """A process server's certificate must not do for another one.

        It may have the config server's names, being on the same host perhaps: that it is none says
        its organizational unit, which whoever speaks to a config server looks at.
        """
        if not names:
            raise InputError("names: a process server has at least one name or address")
        others = (
            select(Certificate.names, Node.name).join(Node).where(*_live_of_others(node, now_ns))
        )
        for taken, holder in await session.execute(others):
            shared = shared_name(names, taken)
            if shared is not None:
                raise ConflictError(
                    f"names: {shared} is a name of the process server {holder}",
                    hint="one name leads to one process server; if that one is gone, revoke it: "
                    f"understudy certificates revoke {holder}",
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
    node = await _locked(session, asked.node_id)
    revoked = []
    if node is not None:
        node.new_key_until_ns = 0
    for row in await _live(session, asked.node_id, now_ns):
        row.revoked_ns, row.revoked_by = now_ns, by
        revoked.append(row.serial)
    await session.flush()
    await session.refresh(asked)
    return asked, revoked


async def allow_new_key(session: AsyncSession, node_id: uuid.UUID, now_ns: int) -> Node:
    """Let a node that has no good certificate enrol with a new key: once, for an hour.

    Raises NotFoundError, ConflictError for a node whose certificate is good.
    """
    node = await _locked(session, node_id)
    if node is None:
        raise NotFoundError(
            f"there is no node {node_id}", hint="a new node needs no leave; list: GET certificates"
        )
    live = await _live(session, node_id, now_ns)
    if live:
        raise ConflictError(
            f"{node.role} {node.name} has a certificate that is good",
            hint=f"if it lost its key, first: understudy certificates revoke {live[-1].serial}",
        )
    node.new_key_until_ns = now_ns + NEW_KEY_SECONDS * _NS
    await session.flush()
    return node


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


async def _refuse_other_key(session: AsyncSession, node: Node, digest: str, now_ns: int) -> None:
    """A known id with a new key needs somebody's leave: its data key is given to who has it."""
    live = await _live(session, node.id, now_ns)
    if live:
        if digest in {each.key_digest for each in live}:
            return
        raise ConflictError(
            f"{node.role} {node.id} is enrolled with another key",
            hint="if it lost its identity folder, revoke its certificate first: "
            f"understudy certificates revoke {live[-1].serial}",
        )
    known = select(Certificate.serial).where(
        Certificate.node_id == node.id, Certificate.key_digest == digest
    )
    if await session.scalar(known.limit(1)) is not None:
        return
    if node.new_key_until_ns <= now_ns:
        raise NewKeyError(
            f"{node.role} {node.id} is known with another key",
            hint=f"allow it, then enrol again: understudy certificates allow {node.id}",
        )
    node.new_key_until_ns = 0


async def _refuse_name(session: AsyncSession, node: Node, name: str, now_ns: int) -> None:
    """People name nodes by name or id: neither may mean two of a role."""
    if is_id(name):
        raise InputError(
            f"name: {name} could be taken for an id", hint="give a name that people know: --name"
        )
    if name == node.name and await _live(session, node.id, now_ns):
        return
    taken = (
        select(Node.id).join(Certificate).where(*_live_of_others(node, now_ns), Node.name == name)
    )
    other = await session.scalar(taken.limit(1))
    if other is not None:
        raise ConflictError(
            f"another {node.role} is called {name}: {other}",
            hint="give this one another name (--name); if the other one is gone, revoke it: "
            f"understudy certificates revoke {other}",
        )


def _live_of_others(node: Node, now_ns: int) -> tuple[ColumnElement[bool], ...]:
    """That a certificate is good and of another node of the same role."""
    return (
        Node.id != node.id,
        Node.role == node.role,
        Certificate.revoked_ns.is_(None),
        Certificate.expires_ns > now_ns,
    )


async def _one_at_a_time(session: AsyncSession) -> None:
    """Two that enrol at once under one name must see each other."""
    row = select(Setting.key).where(Setting.key == SETTINGS[PassphraseKind.MACHINES])
    await session.execute(row.with_for_update())


async def _refuse_revoked_key(session: AsyncSession, digest: str) -> None:
    found = select(Certificate.serial).where(
        Certificate.key_digest == digest, Certificate.revoked_ns.is_not(None)
    )
    if await session.scalar(found.limit(1)) is not None:
        raise KeyRevokedError(
            "a certificate of this key was revoked", hint="enrol with a new key: `enrol --again`"
        )
