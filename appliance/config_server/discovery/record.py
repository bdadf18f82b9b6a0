"""The inventory in the database: written in batches, by the one who holds the vCenter's lease.

Each transaction begins with the vCenter's row: where another config server has taken the lease, or
somebody has changed the entry, nothing is written.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import Any

from sqlalchemy import CursorResult, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.discovery.inventory import Change, VirtualDisk, Vm, compare
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import VCenter, VirtualMachine

BATCH_ROWS = 200
LEASE_SECONDS = 15
NS = 1_000_000_000


class VCenterState(StrEnum):
    """How a vCenter is. REFUSED lasts until somebody changes the entry."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    UNREACHABLE = "unreachable"
    REFUSED = "refused"


class LeaseLostError(Exception):
    """Another one reads this vCenter now, or its entry has changed: write nothing."""


class Record:
    """What is kept of one vCenter, for the ``reader`` that holds its lease.

    known: the VMs as they are in the database, once they have been loaded.
    """

    def __init__(
        self,
        database: Database,
        clock: Callable[[], int],
        *,
        vcenter: uuid.UUID,
        revision: int,
        reader: str,
    ) -> None:
        self._database = database
        self._clock = clock
        self._vcenter = vcenter
        self._revision = revision
        self._reader = reader
        self.known: dict[str, Vm] | None = None

    async def set_state(self, state: VCenterState, reason: str = "", **columns: Any) -> None:
        """Note how the vCenter is. Of one that cannot be asked all VMs are stale."""
        columns |= {"state": state, "reason": reason}
        is_stale = state is not VCenterState.CONNECTED
        async with self._database.writing() as session:
            await self._fence(session, columns)
            await session.execute(
                update(VirtualMachine)
                .where(
                    VirtualMachine.vcenter_id == self._vcenter,
                    VirtualMachine.removed_ns.is_(None),
                    VirtualMachine.stale != is_stale,
                )
                .values(stale=is_stale)
            )

    async def set_instance(self, instance_uuid: str) -> str:
        """Note which vCenter answers; return why it is not to be read, empty when it is."""
        async with self._database.writing() as session:
            await self._fence(session, {})
            row = await session.get_one(VCenter, self._vcenter)
            if row.instance_uuid and instance_uuid != row.instance_uuid:
                return (
                    f"another vCenter ({instance_uuid}) answers at its address; "
                    "add that one by itself, or change the address"
                )
            twin = await session.scalar(
                select(VCenter.name).where(
                    VCenter.instance_uuid == instance_uuid, VCenter.id != self._vcenter
                )
            )
            if twin is not None:
                return f"it is the same vCenter as {twin}; remove one of them"
            row.instance_uuid = instance_uuid
        return ""

    async def seen(self) -> None:
        """Note that it answers."""
        async with self._database.writing() as session:
            await self._fence(session, {"seen_ns": self._clock()})

    async def replace(self, vms: Mapping[str, Vm]) -> tuple[Change, ...]:
        """Have the inventory be ``vms``; return what changed."""
        if self.known is None:
            self.known = await self._load()
        return await self._write(compare(self.known, vms))

    async def apply(self, vms: Mapping[str, Vm], removed: frozenset[str]) -> tuple[Change, ...]:
        """Write VMs that are new or other, and note those that are gone; return what changed."""
        assert self.known is not None, "changes come after a whole reading"
        touched = vms.keys() | removed
        before = {moid: vm for moid, vm in self.known.items() if moid in touched}
        return await self._write(compare(before, vms))

    async def _write(self, changes: Sequence[Change]) -> tuple[Change, ...]:
        assert self.known is not None
        for start in range(0, len(changes), BATCH_ROWS):
            batch = changes[start : start + BATCH_ROWS]
            now_ns = self._clock()
            async with self._database.writing() as session:
                await self._fence(session, {"seen_ns": now_ns})
                rows = await self._rows(session, [change.moid for change in batch])
                for change in batch:
                    self._put(session, change, rows.get(change.moid), now_ns)
            for change in batch:  # only what is committed is known
                if change.after is None:
                    self.known.pop(change.moid, None)
                else:
                    self.known[change.moid] = change.after
        return tuple(changes)

    def _put(
        self, session: AsyncSession, change: Change, row: VirtualMachine | None, now_ns: int
    ) -> None:
        if change.after is None:
            if row is not None:
                row.removed_ns = row.updated_ns = now_ns
            return
        if row is None:
            row = VirtualMachine(id=uuid.uuid4(), vcenter_id=self._vcenter, moid=change.moid)
            session.add(row)
        columns = asdict(change.after)
        columns["addresses"] = list(columns["addresses"])
        columns["disks"] = list(columns["disks"])
        for name, value in columns.items():
            setattr(row, name, value)
        row.stale, row.removed_ns, row.updated_ns = False, None, now_ns

    async def _rows(self, session: AsyncSession, moids: Sequence[str]) -> dict[str, VirtualMachine]:
        """By moid, also of VMs that were gone: one that comes back is the same."""
        found = await session.scalars(
            select(VirtualMachine).where(
                VirtualMachine.vcenter_id == self._vcenter, VirtualMachine.moid.in_(moids)
            )
        )
        return {row.moid: row for row in found}

    async def _load(self) -> dict[str, Vm]:
        async with self._database.reading() as session:
            rows = await session.scalars(
                select(VirtualMachine).where(
                    VirtualMachine.vcenter_id == self._vcenter, VirtualMachine.removed_ns.is_(None)
                )
            )
            return {row.moid: vm_of_row(row) for row in rows}

    async def _fence(self, session: AsyncSession, columns: Mapping[str, Any]) -> None:
        """Raise LeaseLostError unless this vCenter is still ours to write."""
        done = await session.execute(
            update(VCenter)
            .where(
                VCenter.id == self._vcenter,
                VCenter.revision == self._revision,
                VCenter.reader == self._reader,
            )
            .values({"reader": self._reader, **columns})
        )
        assert isinstance(done, CursorResult)
        if done.rowcount != 1:
            raise LeaseLostError


def vm_of_row(row: VirtualMachine) -> Vm:
    """A VM as it was when it was written."""
    return Vm(
        moid=row.moid,
        name=row.name,
        folder=row.folder,
        host=row.host,
        bios_uuid=row.bios_uuid,
        power=row.power,
        guest_system=row.guest_system,
        hostname=row.hostname,
        addresses=tuple(row.addresses),
        tools=row.tools,
        disks=tuple(VirtualDisk(**disk) for disk in row.disks),
    )


async def take_lease(session: AsyncSession, vcenter: VCenter, reader: str, now_ns: int) -> bool:
    """Take or keep a vCenter for LEASE_SECONDS.

    False while another one has it, when it has refused us, and when its entry has been changed
    since ``vcenter`` was read.
    """
    until_ns = now_ns + LEASE_SECONDS * NS
    done = await session.execute(
        update(VCenter)
        .where(
            VCenter.id == vcenter.id,
            VCenter.revision == vcenter.revision,
            VCenter.state != VCenterState.REFUSED,
            or_(
                VCenter.reader == reader,
                VCenter.reader_until_ns < now_ns,
                # One that ends later than anybody takes it was written by a wrong clock.
                VCenter.reader_until_ns > until_ns + LEASE_SECONDS * NS,
            ),
        )
        .values(reader=reader, reader_until_ns=until_ns)
    )
    assert isinstance(done, CursorResult)
    return done.rowcount == 1


async def give_up_leases(session: AsyncSession, reader: str) -> None:
    """Let others have them at once."""
    await session.execute(
        update(VCenter).where(VCenter.reader == reader).values(reader="", reader_until_ns=0)
    )
