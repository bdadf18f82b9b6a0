"""``certificates``: nodes' certificates, how they are revoked, and who may have a new one."""

import uuid
from typing import Annotated

from fastapi import Path
from pydantic import BaseModel
from sqlalchemy import select

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Router, ServerOf
from appliance.config_server.caller import Caller
from appliance.config_server.identity.certificates import allow_new_key, revoke
from appliance.config_server.store.schema import Certificate, Node
from replication.control.role import NodeRole, OperatorRole

router = Router("certificates")
Reader = Annotated[Caller, needs(OperatorRole.READER)]
Contributor = Annotated[Caller, needs(OperatorRole.CONTRIBUTOR)]
SerialInPath = Annotated[str, Path(pattern=r"^[0-9a-f]{1,40}$")]


class CertificateDocument(BaseModel):
    """A certificate of a node; times in nanoseconds since 1970, ``serial`` in hexadecimal."""

    serial: str
    node: uuid.UUID
    name: str
    role: NodeRole
    issued_ns: int
    expires_ns: int
    revoked_ns: int | None
    revoked_by: str | None


class Revocation(BaseModel):
    """The certificate that was named, and the serials that are good no more since now: all that
    its node held.
    """

    certificate: CertificateDocument
    revoked: list[str]


class NewKeyLeave(BaseModel):
    """A node that may enrol with a new key, once, before ``until_ns``."""

    node: uuid.UUID
    name: str
    role: NodeRole
    until_ns: int


@router.get("")
async def list_certificates(
    server: ServerOf, paging: PagingOf, _: Reader
) -> Page[CertificateDocument]:
    """List the certificates by serial, those that are expired or revoked as well."""
    async with server.database.reading() as session:
        rows, following = await read_page(
            session, select(Certificate), [Certificate.serial], paging
        )
        found = select(Node).where(Node.id.in_({row.node_id for row in rows}))
        nodes = {node.id: node for node in await session.scalars(found)}
    return Page(items=[_document(row, nodes[row.node_id]) for row in rows], next=following)


@router.post("/{serial}/revoke")
async def revoke_certificate(
    server: ServerOf, caller: Contributor, serial: SerialInPath
) -> Revocation:
    """Revoke all certificates of the node that holds this one; it is out until it is
    allowed a new key and enrols again.
    """
    detail: dict[str, object] = {}
    async with server.change(caller, "certificate.revoke", serial, detail) as session:
        row, revoked = await revoke(session, serial, by=caller.name, now_ns=server.clock())
        node = await session.get(Node, row.node_id)
        assert node is not None
        detail.update(node=str(node.id), name=node.name, revoked=revoked)
        await server.nodes.versions.bump_role(session, NodeRole.PROCESS_SERVER)
        await server.nodes.bump(session, [node.id])
    return Revocation(certificate=_document(row, node), revoked=revoked)


@router.post("/allow/{node}")
async def allow_certificate(server: ServerOf, caller: Contributor, node: uuid.UUID) -> NewKeyLeave:
    """Let a node whose certificates are revoked or expired enrol with a new key, within an hour."""
    detail: dict[str, object] = {}
    async with server.change(caller, "certificate.allow", str(node), detail) as session:
        row = await allow_new_key(session, node, server.clock())
        detail.update(name=row.name, role=row.role)
    return NewKeyLeave(
        node=row.id, name=row.name, role=NodeRole(row.role), until_ns=row.new_key_until_ns
    )


def _document(row: Certificate, node: Node) -> CertificateDocument:
    return CertificateDocument(
        serial=row.serial,
        node=row.node_id,
        name=node.name,
        role=NodeRole(node.role),
        issued_ns=row.issued_ns,
        expires_ns=row.expires_ns,
        revoked_ns=row.revoked_ns,
        revoked_by=row.revoked_by,
    )
