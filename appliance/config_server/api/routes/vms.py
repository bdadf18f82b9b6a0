"""``vms``: the inventory of all vCenters, and which VM is which enrolled machine."""

import uuid
from collections.abc import Mapping
from typing import Annotated, Literal, cast

from fastapi import Query
from pydantic import BaseModel
from sqlalchemy import Select, exists, or_, select

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Router, ServerOf
from appliance.config_server.caller import NAME_CHARS_MAX, Caller
from appliance.config_server.discovery.entries import find_vcenter
from appliance.config_server.discovery.matching import Enrolled, machines_of
from appliance.config_server.protection.table import State
from appliance.config_server.store.schema import Machine, Node, VCenter, VirtualMachine
from replication.control.role import OperatorRole

router = Router("vms")
Reader = Annotated[Caller, needs(OperatorRole.READER)]
Text = Annotated[str | None, Query(max_length=NAME_CHARS_MAX, pattern=r"^[^\x00]*$")]
Power = Literal["on", "off", "suspended", "unknown"]


class VmDisk(BaseModel):
    """A disk of a VM. ``path``: its backing file; ``key`` stays while the disk stays."""

    key: int
    label: str
    path: str
    capacity_bytes: int
    uuid: str


class VmDocument(BaseModel):
    """A virtual machine.

    stale:      its vCenter cannot be asked just now: this is how it was at ``updated_ns``.
    machine:    the enrolled machine that it is, by BIOS UUID; none without an agent, or when
                copies cannot be told apart.
    protection: that machine's state; none when it never was protected.
    """

    id: uuid.UUID
    vcenter: str
    vcenter_id: uuid.UUID
    moid: str
    name: str
    folder: str
    host: str
    bios_uuid: uuid.UUID | None
    power: Power
    guest_system: str
    hostname: str
    addresses: list[str]
    tools: str
    disks: list[VmDisk]
    stale: bool
    updated_ns: int
    machine: str | None
    protection: str | None


@router.get("")
async def list_vms(
    server: ServerOf,
    paging: PagingOf,
    _: Reader,
    vcenter: Text = None,
    name: Text = None,
    power: Power | None = None,
    *,
    unprotected: bool = False,
) -> Page[VmDocument]:
    """List VMs by name: of one vCenter, with a part of a name, by power, without protection."""
    async with server.database.reading() as session:
        query = select(VirtualMachine).where(VirtualMachine.removed_ns.is_(None))
        if vcenter is not None:
            query = query.where(
                VirtualMachine.vcenter_id == (await find_vcenter(session, vcenter)).id
            )
        if name:
            query = query.where(VirtualMachine.name.icontains(name, autoescape=True))
        if power is not None:
            query = query.where(VirtualMachine.power == power)
        if unprotected:
            query = _unprotected(query)
        rows, following = await read_page(
            session, query, [VirtualMachine.name, VirtualMachine.id], paging
        )
        machines = await machines_of(session, rows)
        names = {row.id: row.name for row in await session.scalars(select(VCenter))}
    return Page(items=[_document(row, machines, names) for row in rows], next=following)


def _unprotected(query: Select[VirtualMachine]) -> Select[VirtualMachine]:
    """VMs that no protected machine is."""
    protecting = (
        exists()
        .where(Machine.id == Node.id, Machine.state != State.UNPROTECTED)
        .where(or_(Machine.vm_id == VirtualMachine.id, Node.bios_uuid == VirtualMachine.bios_uuid))
    )
    return query.where(~protecting)


def _document(
    row: VirtualMachine,
    machines: Mapping[uuid.UUID, Enrolled],
    vcenters: Mapping[uuid.UUID, str],
) -> VmDocument:
    enrolled = machines.get(row.id)
    return VmDocument(
        id=row.id,
        vcenter=vcenters[row.vcenter_id],
        vcenter_id=row.vcenter_id,
        moid=row.moid,
        name=row.name,
        folder=row.folder,
        host=row.host,
        bios_uuid=row.bios_uuid,
        power=cast("Power", row.power),
        guest_system=row.guest_system,
        hostname=row.hostname,
        addresses=row.addresses,
        tools=row.tools,
        disks=[VmDisk.model_validate(disk) for disk in row.disks],
        stale=row.stale,
        updated_ns=row.updated_ns,
        machine=enrolled.name if enrolled else None,
        protection=(enrolled.state or None) if enrolled else None,
    )
