"""``node``: what nodes are told, what they say, their certificates and data keys.

Source: docs/CONTROL.md §3 to §5.
"""

import asyncio
import uuid
from http import HTTPStatus
from typing import Annotated

from fastapi import Body, Query, Request, Response
from sqlalchemy import bindparam, select

from appliance.config_server.api.access import needs_node
from appliance.config_server.api.peer import peer_of
from appliance.config_server.api.router import Count64, Router, ServerOf
from appliance.config_server.caller import Caller
from appliance.config_server.identity import data_keys
from appliance.config_server.identity.enrolment import read_signing_request
from appliance.config_server.recovery.intake import take_evidence, take_points
from appliance.config_server.server import Server
from appliance.config_server.store.schema import Certificate, Node
from daemon.certificates import certificate_pem, serial_text
from daemon.control_config import WAIT_SECONDS_MAX
from replication.control.assignment import Assignment
from replication.control.data_key import GivenDataKey
from replication.control.enrolment import Enrolled, RenewalRequest
from replication.control.recovery import Evidence, EvidenceKind, PointList
from replication.control.report import AnyReport, ReportAnswer
from replication.control.role import NodeRole
from replication.errors import (
    InputError,
    LimitError,
    NotFoundError,
    PeerError,
    UnknownCallerError,
)

router = Router("node")
AnyNode = Annotated[Caller, needs_node()]
KeyHolder = Annotated[Caller, needs_node(NodeRole.MACHINE, NodeRole.APPLIER)]
Said = Annotated[AnyReport, Body(discriminator="kind")]
_STANDING = (
    select(Certificate.revoked_ns, Node.assignment_version)
    .join(Node, Node.id == Certificate.node_id)
    .where(Certificate.serial == bindparam("serial"))
)
WaitSeconds = Annotated[float, Query(ge=0, le=WAIT_SECONDS_MAX)]


@router.get(
    "/assignment",
    response_model=Assignment,
    responses={HTTPStatus.NO_CONTENT: {"description": "None of another version."}},
)
async def assignment(
    server: ServerOf,
    caller: AnyNode,
    after: Annotated[Count64, Query()] = 0,
    wait_seconds: WaitSeconds = 0.0,
) -> Response:
    """Get the node's assignment as soon as its version is another than ``after``."""
    versions = server.nodes.versions
    with versions.waiters.waiting(caller.node_id) as news:
        found = await _assignment(server, caller, after)
        if found is None and wait_seconds:
            await _wait(news, server.stop, wait_seconds)
            found = await _assignment(server, caller, after)
    if found is None:
        return Response(status_code=HTTPStatus.NO_CONTENT)
    return Response(found.model_dump_json(), media_type="application/json")


@router.post("/reports")
async def report(server: ServerOf, caller: AnyNode, said: Said) -> ReportAnswer:
    """Say how the node is: the whole of it; only the newest counts."""
    if said.kind != caller.role:
        raise InputError(f"kind: a {caller.role} does not report as a {said.kind}")
    version = await server.nodes.take_report(server.database, caller.node_id, said, server.clock())
    server.protection.performer.wake(caller.node_id)
    return ReportAnswer(time_ns=server.clock(), assignment=version)


@router.post("/certificate")
async def renew(
    server: ServerOf, caller: AnyNode, http: Request, request: RenewalRequest
) -> Enrolled:
    """Get the next certificate under the one that is shown."""
    peer = peer_of(http)
    assert peer is not None, "the caller was let in by it"
    signing_request = read_signing_request(request.csr_pem)
    detail: dict[str, object] = {"shown": caller.serial}
    async with server.change(caller, "node.renew", caller.name, detail) as session:
        issued = await server.identity.authority.renew(
            session, caller.serial, signing_request, peer.names, server.clock()
        )
        detail["serial"] = serial_text(issued.serial_number)
    return Enrolled(
        node=caller.node_id,
        certificate_pem=certificate_pem(issued).decode(),
        ca_pem=server.identity.keyring.ca_pem,
    )


@router.get("/data-keys/{machine}")
async def data_key(server: ServerOf, caller: KeyHolder, machine: uuid.UUID) -> GivenDataKey:
    """Get a machine's data key: its own agent, and the applier that it is assigned to."""
    assert isinstance(caller.role, NodeRole)
    wait = server.key_rates.take(caller.role, caller.node_id)
    if wait > 0:
        raise LimitError(
            "too many data keys were asked for",
            hint="a key is fetched once and kept",
            retry_after_seconds=wait,
        )
    async with server.change(caller, "data-key.give", str(machine)) as session:
        key = await data_keys.give(
            session, server.identity.vault, machine, node=caller.node_id, role=caller.role
        )
    return GivenDataKey(machine=machine, data_key=key.hex())


@router.post("/points", status_code=HTTPStatus.NO_CONTENT)
async def put_points(
    server: ServerOf, caller: Annotated[Caller, needs_node(NodeRole.APPLIER)], points: PointList
) -> None:
    """Put all recovery points of a machine that is assigned to the applier."""
    async with server.database.writing() as session:
        await take_points(session, caller.node_id, points, server.clock())


@router.post("/evidence/{vm}/{kind}", status_code=HTTPStatus.NO_CONTENT)
async def put_evidence(
    server: ServerOf,
    caller: Annotated[Caller, needs_node(NodeRole.COMPUTE)],
    vm: uuid.UUID,
    kind: EvidenceKind,
    evidence: Evidence,
) -> None:
    """Put the console or a screenshot of a VM that is in the compute node's assignment."""
    try:
        content = evidence.bytes()
    except PeerError as error:
        raise InputError(f"content: {error}") from error
    async with server.database.writing() as session:
        await take_evidence(session, caller.node_id, vm, kind, content, now_ns=server.clock())


async def _assignment(server: Server, caller: Caller, after: int) -> Assignment | None:
    row = await server.database.look_up(_STANDING, serial=caller.serial)
    if row is None or row.revoked_ns is not None:  # it may be revoked while its holder waits
        raise UnknownCallerError(f"the certificate {caller.serial} is revoked")
    if row.assignment_version == after:
        return None
    async with server.database.reading() as session:
        node = await session.get(Node, caller.node_id)
        if node is None:
            raise NotFoundError(f"there is no node {caller.node_id}", hint="enrol it again")
        return await server.nodes.assignment(session, node, server.clock())


async def _wait(news: asyncio.Event, stop: asyncio.Event, seconds: float) -> None:
    tasks = [asyncio.ensure_future(one.wait()) for one in (news, stop)]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
