"""``machines``: those whose agent is enrolled; how they are protected, and changing that."""

import uuid
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.api.access import needs
from appliance.config_server.api.documents import HealthDocument
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Name, Router, ServerOf
from appliance.config_server.api.routes.jobs import JobDocument
from appliance.config_server.caller import Caller
from appliance.config_server.protection import requests
from appliance.config_server.protection.machines import find_node, heard_of
from appliance.config_server.protection.requests import Asking
from appliance.config_server.protection.table import State
from appliance.config_server.server import Server
from appliance.config_server.store.schema import Job, Machine, Node, Policy, ProtectedDisk
from appliance.config_server.watching.health import machine_rpo
from replication.control.report import MachineReport, Phase
from replication.control.role import NodeRole, OperatorRole

router = Router("machines")
Reader = Annotated[Caller, needs(OperatorRole.READER)]
Operator = Annotated[Caller, needs(OperatorRole.OPERATOR)]
Contributor = Annotated[Caller, needs(OperatorRole.CONTRIBUTOR)]
Reference = Annotated[str, Path(min_length=1, max_length=255, pattern=r"^[^/\x00]+$")]
DeviceName = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00]+$")]
DISKS_ASKED_MAX = 64
INDEX_MAX = 65535


class ProtectRequest(BaseModel):
    """disks: by device or id; left out: all. process_server, applier: by name or id; left out: the
    least loaded ones.
    """

    model_config = ConfigDict(extra="forbid")

    policy: Name
    disks: Annotated[list[DeviceName], Field(max_length=DISKS_ASKED_MAX)] | None = None
    process_server: DeviceName | None = None
    applier: DeviceName | None = None


class UnprotectRequest(BaseModel):
    """keep_points: whether the recovery points stay where they are."""

    model_config = ConfigDict(extra="forbid")

    keep_points: bool


class DiskRequest(BaseModel):
    """device: its path or id."""

    model_config = ConfigDict(extra="forbid")

    device: DeviceName


class ResyncRequest(BaseModel):
    """now: at once; else when the policy's window opens."""

    model_config = ConfigDict(extra="forbid")

    now: bool = True


class DiskDocument(BaseModel):
    """A disk: as its agent reports it, and as it is protected.

    index:    its number in the stream; none while it never had one.
    reason:   why it cannot be tracked; empty when it can.
    """

    index: int | None
    device: str
    id: str
    size_bytes: int
    protected: bool
    is_system: bool = False
    present: bool = True
    reason: str = ""


class ProgressDocument(BaseModel):
    """Of an initial replication or a resync, and what is still to be sent."""

    phase: Phase
    done_bytes: int
    total_bytes: int
    todo_bytes: int


class MachineDocument(BaseModel):
    """A machine whose agent is enrolled.

    cause, reason: why a resync is required, or is under way.
    job:           the one that is at work on it.
    point_count, space_bytes: its recovery points, and what they take at the applier; as that said
        last.
    rpo_…_seconds: none while there is nothing to restore.
    health:        none until the config server has looked for the first time.
    """

    id: uuid.UUID
    name: str
    state: State
    since_ns: int | None
    cause: str = ""
    reason: str = ""
    policy: str | None = None
    process_server: str | None = None
    applier: str | None = None
    points: str = ""
    point_count: int = 0
    space_bytes: int = 0
    job: str | None = None
    revision: int = 0
    seen_ns: int
    hostname: str = ""
    system: str = ""
    is_virtual: bool = False
    rpo_durable_seconds: float | None = None
    rpo_restorable_seconds: float | None = None
    health: HealthDocument | None = None
    progress: ProgressDocument | None = None
    disks: list[DiskDocument] = []


@router.get("")
async def list_machines(
    server: ServerOf, paging: PagingOf, _: Reader, *, unprotected: bool = False
) -> Page[MachineDocument]:
    """List the machines by name. ``unprotected``: only those that nothing protects."""
    query = select(Node).where(Node.role == NodeRole.MACHINE)
    if unprotected:
        taken = select(Machine.id).where(Machine.state != State.UNPROTECTED)
        query = query.where(Node.id.not_in(taken))
    async with server.database.reading() as session:
        nodes, following = await read_page(session, query, [Node.name, Node.id], paging)
        items = await _documents(server, session, nodes)
    return Page(items=items, next=following)


@router.get("/{machine}")
async def read_machine(server: ServerOf, machine: Reference, _: Reader) -> MachineDocument:
    """One machine, by name or id."""
    async with server.database.reading() as session:
        node = await find_node(session, machine, server.clock())
        return (await _documents(server, session, [node]))[0]


@router.post("/{machine}/protect", status_code=HTTPStatus.ACCEPTED)
async def protect(
    server: ServerOf, caller: Contributor, machine: Reference, request: ProtectRequest
) -> JobDocument:
    """Begin to protect a machine."""
    detail = request.model_dump(exclude_none=True)
    async with server.change(caller, "machine.protect", machine, detail) as session:
        job = await requests.protect(
            _asking(server, session, caller),
            machine,
            policy=request.policy,
            disks=None if request.disks is None else tuple(request.disks),
            process_server=request.process_server,
            applier=request.applier,
        )
    return await _begun(server, job)


@router.post("/{machine}/unprotect", status_code=HTTPStatus.ACCEPTED)
async def unprotect(
    server: ServerOf, caller: Contributor, machine: Reference, request: UnprotectRequest
) -> JobDocument:
    """End a machine's protection, or delete the points that were kept when it ended."""
    detail = request.model_dump()
    async with server.change(caller, "machine.unprotect", machine, detail) as session:
        asking = _asking(server, session, caller)
        job = await requests.unprotect(asking, machine, keep_points=request.keep_points)
    return await _begun(server, job)


@router.post("/{machine}/disks", status_code=HTTPStatus.ACCEPTED)
async def add_disk(
    server: ServerOf, caller: Contributor, machine: Reference, request: DiskRequest
) -> JobDocument:
    """Replicate one more disk."""
    async with server.change(
        caller, "machine.add-disk", machine, {"device": request.device}
    ) as session:
        job = await requests.add_disk(_asking(server, session, caller), machine, request.device)
    return await _begun(server, job)


@router.delete("/{machine}/disks/{index}", status_code=HTTPStatus.ACCEPTED)
async def exclude_disk(
    server: ServerOf,
    caller: Contributor,
    machine: Reference,
    index: Annotated[int, Path(ge=0, le=INDEX_MAX)],
) -> JobDocument:
    """Replicate a disk no more; it stays excluded until it is added again."""
    async with server.change(caller, "machine.exclude-disk", machine, {"index": index}) as session:
        job = await requests.exclude_disk(_asking(server, session, caller), machine, index)
    return await _begun(server, job)


@router.post("/{machine}/resync", status_code=HTTPStatus.ACCEPTED)
async def resync(
    server: ServerOf, caller: Operator, machine: Reference, request: ResyncRequest
) -> JobDocument:
    """Compare both sides and send what differs; the old points stay."""
    async with server.change(caller, "machine.resync", machine, {"now": request.now}) as session:
        job = await requests.resync(_asking(server, session, caller), machine, now=request.now)
    return await _begun(server, job)


def _asking(server: Server, session: AsyncSession, caller: Caller) -> Asking:
    return Asking(session, server.protection.ports, server.clock(), caller.name)


async def _begun(server: Server, job: Job) -> JobDocument:
    """The job is written; whether it can be started at once or by the next sweep is all one."""
    await server.protection.begin(job.id)
    return JobDocument.of(job)


async def _documents(
    server: Server, session: AsyncSession, nodes: Sequence[Node]
) -> list[MachineDocument]:
    ids = [node.id for node in nodes]
    machines = {
        row.id: row for row in await session.scalars(select(Machine).where(Machine.id.in_(ids)))
    }
    disks: dict[uuid.UUID, list[ProtectedDisk]] = {}
    for disk in await session.scalars(
        select(ProtectedDisk).where(ProtectedDisk.machine_id.in_(ids))
    ):
        disks.setdefault(disk.machine_id, []).append(disk)
    policies = {row.id: row.name for row in await session.scalars(select(Policy))}
    appliance = await session.execute(
        select(Node.id, Node.name).where(Node.role != NodeRole.MACHINE)
    )
    names = policies | {node: name for node, name in appliance}  # noqa: C416 - rows are no pairs
    return [
        await _document(server, node, machines.get(node.id), disks.get(node.id, []), names)
        for node in nodes
    ]


async def _document(
    server: Server,
    node: Node,
    machine: Machine | None,
    disks: Sequence[ProtectedDisk],
    names: dict[uuid.UUID, str],
) -> MachineDocument:
    heard = heard_of(server.protection.ports, node)
    report = heard.report if heard and isinstance(heard.report, MachineReport) else None
    document = MachineDocument(
        id=node.id,
        name=machine.name if machine else node.name,
        state=State(machine.state) if machine else State.UNPROTECTED,
        since_ns=machine.since_ns if machine else None,
        seen_ns=heard.seen_ns if heard else 0,
        disks=_disk_documents(disks, report),
    )
    if report is not None:
        document.hostname = report.hostname
        document.system = report.system
        document.progress = ProgressDocument(
            phase=report.phase,
            done_bytes=report.done_bytes,
            total_bytes=report.total_bytes,
            todo_bytes=report.todo_bytes,
        )
    if machine is not None:
        document.cause = machine.cause
        document.reason = machine.reason
        document.policy = names.get(machine.policy_id) if machine.policy_id else None
        document.process_server = (
            names.get(machine.process_server_id) if machine.process_server_id else None
        )
        document.applier = names.get(machine.applier_id) if machine.applier_id else None
        document.points = machine.points
        document.job = machine.job_id
        document.revision = machine.revision
        document.is_virtual = machine.vm_id is not None
    assessed = server.watching.watcher.assessment.machines.get(node.id)
    if assessed is not None:
        rpo = machine_rpo(assessed.facts, server.clock())
        document.rpo_durable_seconds = rpo.durable_seconds
        document.rpo_restorable_seconds = rpo.restorable_seconds
        document.health = HealthDocument.of(assessed.health)
        if assessed.facts.store is not None:
            document.point_count = assessed.facts.store.point_count
            document.space_bytes = assessed.facts.store.space_bytes
    return document


def _disk_documents(
    rows: Sequence[ProtectedDisk], report: MachineReport | None
) -> list[DiskDocument]:
    """Those that are numbered, then those that the agent reports beside them."""
    devices = {device.id: device for device in report.devices} if report else {}
    found = []
    for row in sorted(rows, key=lambda row: row.index):
        device = devices.pop(row.device_id, None)
        found.append(
            DiskDocument(
                index=row.index,
                device=device.device if device else row.device,
                id=row.device_id,
                size_bytes=device.size_bytes if device else row.size_bytes,
                protected=not row.excluded,
                is_system=device.is_system if device else False,
                present=device is not None,
                reason=device.reason if device else "",
            )
        )
    found += [
        DiskDocument(
            index=None,
            device=device.device,
            id=device.id,
            size_bytes=device.size_bytes,
            protected=False,
            is_system=device.is_system,
            reason=device.reason,
        )
        for device in devices.values()
    ]
    return found
