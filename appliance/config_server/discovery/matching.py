"""Which enrolled machine a VM is, looked up in the database."""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.discovery.inventory import Identity, match, swapped
from appliance.config_server.store.schema import Machine, Node, VirtualMachine
from replication.control.role import NodeRole


@dataclass(frozen=True, slots=True)
class Enrolled:
    """The enrolled machine that a VM is. ``state``: of its protection; empty when it never had
    any.
    """

    name: str
    state: str


async def machines_of(
    session: AsyncSession, vms: Iterable[VirtualMachine]
) -> Mapping[uuid.UUID, Enrolled]:
    """The enrolled machines of some VMs, by VM. One that is ambiguous is left out."""
    wanted = _variants(vm.bios_uuid for vm in vms)
    nodes = await _nodes(session, wanted)
    matches = match(_identities(nodes), await _vms(session, wanted))
    found = await session.execute(
        select(Machine.id, Machine.state).where(Machine.id.in_([node.id for node in nodes]))
    )
    states: dict[uuid.UUID, str] = {row.id: row.state for row in found}
    return {
        told.vm: Enrolled(node.name, states.get(node.id, ""))
        for node in nodes
        if (told := matches[node.id]).vm is not None
    }


async def vm_of(session: AsyncSession, node: Node) -> uuid.UUID | None:
    """The VM that an enrolled machine is; None for a physical one, or when it is ambiguous."""
    wanted = _variants([node.bios_uuid])
    rivals = await _nodes(session, wanted)
    return match(_identities(rivals), await _vms(session, wanted))[node.id].vm if rivals else None


def _variants(values: Iterable[uuid.UUID | None]) -> list[uuid.UUID]:
    """Those UUIDs in both byte orders."""
    known = {value for value in values if value is not None}
    return list(known | {swapped(value) for value in known})


async def _nodes(session: AsyncSession, wanted: list[uuid.UUID]) -> list[Node]:
    if not wanted:
        return []
    query = select(Node).where(Node.role == NodeRole.MACHINE, Node.bios_uuid.in_(wanted))
    return list(await session.scalars(query))


async def _vms(session: AsyncSession, wanted: list[uuid.UUID]) -> list[Identity]:
    if not wanted:
        return []
    rows = await session.scalars(
        select(VirtualMachine).where(
            VirtualMachine.bios_uuid.in_(wanted), VirtualMachine.removed_ns.is_(None)
        )
    )
    return [Identity(row.id, row.bios_uuid, (row.name, row.hostname)) for row in rows]


def _identities(nodes: Iterable[Node]) -> list[Identity]:
    return [Identity(node.id, node.bios_uuid, (node.name,)) for node in nodes]
