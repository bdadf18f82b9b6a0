"""``failovers``: test failovers and failovers, one per machine, and what is done with them.

Source: docs/RECOVERY.md §4, §8.
"""

import uuid
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Path, Query, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.api.access import needs
from appliance.config_server.api.failover_document import FailoverDocument, documents_of
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Name, Router, ServerOf
from appliance.config_server.api.routes.jobs import JobDocument
from appliance.config_server.api.routes.machines import Reference
from appliance.config_server.caller import Caller
from appliance.config_server.protection.machines import find_node, uuid_of
from appliance.config_server.protection.requests import Asking
from appliance.config_server.recovery.follow_up import cancel, change_point, commit
from appliance.config_server.recovery.requests import (
    NOTES_CHARACTERS_MAX,
    begin_failover,
    clean_up,
)
from appliance.config_server.recovery.run import (
    OPEN,
    FailoverKind,
    FailoverOptions,
    RunMachine,
)
from appliance.config_server.server import Server
from appliance.config_server.store.recovery_tables import Failover, StoredEvidence
from appliance.config_server.store.schema import Job
from replication.control.recovery import EvidenceKind, PointChoice
from replication.control.role import OperatorRole
from replication.errors import NotFoundError

router = Router("failovers")
of_machine = Router("machines")
Reader = Annotated[Caller, needs(OperatorRole.READER)]
Operator = Annotated[Caller, needs(OperatorRole.OPERATOR)]
FailoverId = Annotated[uuid.UUID, Path()]
Point = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^/\x00]+$")]
Notes = Annotated[str, Field(max_length=NOTES_CHARACTERS_MAX, pattern=r"^[^\x00]*$")]
MachineQuery = Annotated[str | None, Query(max_length=255, pattern=r"^[^\x00]*$")]
_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}
_PNG_TYPE = "image/png"
_PNG: dict[int | str, dict[str, Any]] = {
    200: {"content": {_PNG_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}


class FailoverRequest(FailoverOptions):
    """kind:    test, planned (loses nothing, needs the source) or unplanned.
    point:   a choice or a point's name; of a planned one it is what was written last.
    network: of the compute node; left out: its default one, or one that is made for this test.
    compute: a compute node by name or id; left out: the emptiest.
    """

    kind: FailoverKind
    point: Point = PointChoice.LATEST.value
    network: Name | None = None
    compute: Name | None = None
    notes: Notes = ""

    def machine(self, machine: uuid.UUID) -> RunMachine:
        options = self.model_dump(include=set(FailoverOptions.model_fields))
        return RunMachine(
            id=machine, point=self.point, options=FailoverOptions.model_validate(options)
        )


class CleanUpRequest(BaseModel):
    """notes: what is to be remembered of the test."""

    model_config = ConfigDict(extra="forbid")

    notes: Notes = ""


class ChangePointRequest(BaseModel):
    """point: a choice or a point's name."""

    model_config = ConfigDict(extra="forbid")

    point: Point


class CommitRequest(BaseModel):
    """delete_points: whether the machine's recovery points go."""

    model_config = ConfigDict(extra="forbid")

    delete_points: bool = False


@of_machine.post("/{machine}/failovers", status_code=HTTPStatus.ACCEPTED)
async def fail_over(
    server: ServerOf, caller: Operator, machine: Reference, request: FailoverRequest
) -> JobDocument:
    """Start the machine at the second site: as a test, or in earnest."""
    detail = request.model_dump(mode="json", exclude={"script", "notes"})
    async with server.change(caller, "failover.begin", machine, detail) as session:
        node = await find_node(session, machine, server.clock())
        job = await begin_failover(
            asking_of(server, session, caller),
            request.kind,
            request.machine(node.id),
            network=request.network,
            compute=request.compute,
            notes=request.notes,
        )
    return await begun(server, job)


@router.get("")
async def list_failovers(
    server: ServerOf,
    paging: PagingOf,
    _: Reader,
    machine: MachineQuery = None,
    kind: FailoverKind | None = None,
    *,
    open: bool | None = None,  # noqa: A002 - the name of the query
) -> Page[FailoverDocument]:
    """List failovers, the newest first.

    machine: by name or id. open: those that have, or may have, a VM; or those that have none.
    """
    query = select(Failover)
    if machine is not None:
        named = Failover.machine == machine
        node = uuid_of(machine)
        query = query.where(named if node is None else named | (Failover.machine_id == node))
    if kind is not None:
        query = query.where(Failover.kind == kind)
    if open is not None:
        query = query.where(Failover.state.in_(OPEN) if open else Failover.state.not_in(OPEN))
    keys = [Failover.asked_ns, Failover.id]
    async with server.database.reading() as session:
        rows, following = await read_page(session, query, keys, paging, descending=True)
        items = await documents_of(server, session, rows)
    return Page(items=items, next=following)


@router.get("/{failover}")
async def read_failover(server: ServerOf, failover: FailoverId, _: Reader) -> FailoverDocument:
    """One failover with its virtual machine, checks, RTO and RPO."""
    async with server.database.reading() as session:
        row = await _find(session, failover)
        return (await documents_of(server, session, [row]))[0]


@router.post("/{failover}/cleanup", status_code=HTTPStatus.ACCEPTED)
async def clean(
    server: ServerOf, caller: Operator, failover: FailoverId, request: CleanUpRequest
) -> JobDocument:
    """Have all of a test failover go; the notes and the evidence stay."""
    async with server.change(caller, "failover.clean-up", str(failover)) as session:
        asking = asking_of(server, session, caller)
        job = await clean_up(asking, failover, notes=request.notes)
    return await begun(server, job)


@router.post("/{failover}/change-point", status_code=HTTPStatus.ACCEPTED)
async def change(
    server: ServerOf, caller: Operator, failover: FailoverId, request: ChangePointRequest
) -> JobDocument:
    """Make the virtual machine from another point; possible until commit."""
    detail = {"point": request.point}
    async with server.change(caller, "failover.change-point", str(failover), detail) as session:
        job = await change_point(asking_of(server, session, caller), failover, request.point)
    return await begun(server, job)


@router.post("/{failover}/commit", status_code=HTTPStatus.ACCEPTED)
async def commit_failover(
    server: ServerOf, caller: Operator, failover: FailoverId, request: CommitRequest
) -> JobDocument:
    """Let the virtual machine stand alone; there is no way back."""
    detail = request.model_dump()
    async with server.change(caller, "failover.commit", str(failover), detail) as session:
        asking = asking_of(server, session, caller)
        job = await commit(asking, failover, delete_points=request.delete_points)
    return await begun(server, job)


@router.post("/{failover}/cancel", status_code=HTTPStatus.ACCEPTED)
async def cancel_failover(server: ServerOf, caller: Operator, failover: FailoverId) -> JobDocument:
    """Take a failover back: the machine is protected again, without a full copy."""
    async with server.change(caller, "failover.cancel", str(failover)) as session:
        job = await cancel(asking_of(server, session, caller), failover)
    return await begun(server, job)


@router.get("/{failover}/console", response_class=Response, responses=_TEXT)
async def read_console(server: ServerOf, failover: FailoverId, _: Reader) -> PlainTextResponse:
    """The virtual machine's serial console, as far as its compute node has put it."""
    content = await _evidence(server, failover, EvidenceKind.CONSOLE)
    return PlainTextResponse(content.decode(errors="replace"))


@router.get("/{failover}/screenshot", response_class=Response, responses=_PNG)
async def read_screenshot(server: ServerOf, failover: FailoverId, _: Reader) -> Response:
    """The virtual machine's screen, as its compute node has put it last."""
    content = await _evidence(server, failover, EvidenceKind.SCREENSHOT)
    return Response(content, media_type=_PNG_TYPE, headers={"x-content-type-options": "nosniff"})


def asking_of(server: Server, session: AsyncSession, caller: Caller) -> Asking:
    """Who asks, in the transaction of a change."""
    return Asking(session, server.protection.ports, server.clock(), caller.name)


async def begun(server: Server, job: Job) -> JobDocument:
    """The job is written; whether it can be started at once or by the next sweep is all one."""
    await server.protection.begin(job.id)
    return JobDocument.of(job)


async def _find(session: AsyncSession, failover: uuid.UUID) -> Failover:
    row = await session.get(Failover, failover)
    if row is None:
        raise NotFoundError(
            f"there is no failover {failover}", hint="`understudy failover list` lists them"
        )
    return row


async def _evidence(server: Server, failover: uuid.UUID, kind: EvidenceKind) -> bytes:
    async with server.database.reading() as session:
        row = await _find(session, failover)
        stored = await session.get(StoredEvidence, (row.vm_id, kind)) if row.vm_id else None
    if stored is None:
        raise NotFoundError(
            f"there is no {kind} of this failover of {row.machine}",
            hint="the compute node puts it when its check has ended",
        )
    return stored.content
