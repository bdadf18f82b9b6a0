"""Nodes that speak the API as the real ones do: take their assignment, follow it, report."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from appliance.config_server.api.peer import Peer
from replication.control.recovery import (
    HeldPoint,
    PointDisk,
    VmCheck,
    VmPower,
    VmReport,
    VmState,
)
from replication.control.report import (
    ApplierReport,
    BlockDevice,
    ComputeReport,
    MachineReport,
    Phase,
    ProcessServerReport,
    Report,
    StoreReport,
)
from replication.control.role import NodeRole
from tests.appliance.config_server.running import Rig

GIB = 1 << 30
REPORT_SECONDS = 0.05
DEVICES = (
    BlockDevice(id="wwn-0", device="/dev/sda", size_bytes=GIB, is_system=True),
    BlockDevice(id="wwn-1", device="/dev/sdb", size_bytes=GIB),
)


@dataclass(slots=True)
class Fleet:
    """Nodes by name. ``stuck``: phases that agents are in whatever they are told."""

    rig: Rig
    peers: dict[str, Peer] = field(default_factory=dict)
    stuck: dict[str, Phase] = field(default_factory=dict)
    assignments: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def join(self, name: str, role: NodeRole, **columns: Any) -> Peer:
        """A node enrols, reports once, and goes on."""
        peer = self.peers[name] = await self.rig.enrol(role, name=name, **columns)
        async with self.rig.node(peer) as client:
            await self._round(client, name, peer)
        self.tasks.append(asyncio.create_task(self._live(name, peer), name=name))
        return peer

    async def _live(self, name: str, peer: Peer) -> None:
        async with self.rig.node(peer) as client:
            while True:
                await self._round(client, name, peer)
                await asyncio.sleep(REPORT_SECONDS)

    async def _round(self, client: httpx.AsyncClient, name: str, peer: Peer) -> None:
        version = self.assignments.get(name, {}).get("version", 0)
        answer = await client.get("node/assignment", params={"after": version})
        if answer.status_code == httpx.codes.OK:
            self.assignments[name] = answer.json()
        told = self.assignments[name]
        if told.get("protected") and name not in self.keys:
            key = await client.get(f"node/data-keys/{peer.node}")
            if key.status_code == httpx.codes.OK:
                self.keys[name] = key.json()["data_key"]
        report = self._report(peer, name, told)
        answer = await client.post("node/reports", json=report.model_dump(mode="json"))
        assert answer.status_code == httpx.codes.OK, answer.text

    def _report(self, peer: Peer, name: str, told: dict[str, Any]) -> Report:
        now_ns = time.time_ns()
        if peer.role is NodeRole.PROCESS_SERVER:
            return ProcessServerReport(
                time_ns=now_ns, assignment=told["version"], url=f"https://{name}:9443"
            )
        if peer.role is NodeRole.APPLIER:
            stores = [
                StoreReport(
                    machine=each["id"], generation=1, applied=1, point_count=1, newest_ns=now_ns
                )
                for each in told["machines"]
            ]
            stores += [StoreReport(machine=each, removed=True) for each in told["removed"]]
            return ApplierReport(
                time_ns=now_ns,
                assignment=told["version"],
                stores=tuple(stores),
                holds=tuple(_held(hold, now_ns) for hold in told["holds"]),
            )
        if peer.role is NodeRole.COMPUTE:
            return ComputeReport(
                time_ns=now_ns,
                assignment=told["version"],
                vms=tuple(_vm(order) for order in told["vms"]),
                removed=tuple(told["removed"]),
            )
        phase = Phase.REPLICATING if told["replicate"] and name in self.keys else Phase.IDLE
        return MachineReport(
            time_ns=now_ns,
            assignment=told["version"],
            devices=DEVICES,
            phase=self.stuck.get(name, phase),
            reason="as the test says" if name in self.stuck else "",
            generation=1,
            committed=1,
            durable_ns=now_ns,
            restorable_ns=now_ns,
            resync_request=told["resync"]["request"],
        )


def _held(hold: dict[str, Any], now_ns: int) -> HeldPoint:
    """Every point is there, whatever it is called."""
    return HeldPoint(
        id=hold["id"],
        machine=hold["machine"],
        state="held",
        folder="web-1",
        point="p1",
        generation=1,
        number=1,
        time_ns=now_ns,
        consistency="crash",
        disks=(PointDisk(index=0, name="sda", size_bytes=GIB),),
    )


def _vm(order: dict[str, Any]) -> VmReport:
    state = VmState.UP if order["power"] == VmPower.ON else VmState.DISKS_READY
    check = VmCheck(passed=True, detail="all mounted") if state is VmState.UP else None
    return VmReport(
        id=order["id"],
        state=state,
        check=check,
        address="10.0.0.2",
        independent=order["independent"],
    )


@contextlib.asynccontextmanager
async def open_fleet(rig: Rig) -> AsyncIterator[Fleet]:
    """A process server, an applier and the machine web-1; jobs and reports are looked after."""
    fleet = Fleet(rig)
    server = rig.server
    fleet.tasks.append(asyncio.create_task(server.protection.look_after(server.health)))
    try:
        await fleet.join("ps-1", NodeRole.PROCESS_SERVER)
        await fleet.join("applier-1", NodeRole.APPLIER)
        await fleet.join("web-1", NodeRole.MACHINE, bios_uuid=uuid.UUID(int=7))
        yield fleet
    finally:
        for task in fleet.tasks:
            task.cancel()
        await asyncio.gather(*fleet.tasks, return_exceptions=True)
