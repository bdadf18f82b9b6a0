"""Looking at what the nodes report, and at the clock: machines change state, windows open.

A look reads rows and reports and decides (`observation`); where something follows, it decides again
in a transaction that holds the row, so that of two config servers one writes it.

Source: docs/CONTROL.md §9, §11.
"""

import asyncio
import uuid
from collections.abc import Callable

import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.protection.machines import lock_machine
from appliance.config_server.protection.observation import (
    DiskView,
    MachineView,
    Observation,
    apply_report,
)
from appliance.config_server.protection.policies import tell_users
from appliance.config_server.protection.table import RESYNCING, Event, State
from appliance.config_server.protection.transition import REMOVING, enter, forget_points
from appliance.config_server.protection.window import resync_allowed
from appliance.config_server.protection.workflow import Heard, Ports, read_report, store_of
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import Machine, Node, Policy, ProtectedDisk
from daemon.service import Health
from replication.control.report import MachineReport
from replication.errors import ReplicationError

LOOK_SECONDS = 2.0
PART = "protection"


class Observer:
    """Looks at all machines every LOOK_SECONDS."""

    def __init__(self, database: Database, ports: Ports, clock: Callable[[], int]) -> None:
        self._database = database
        self._ports = ports
        self._clock = clock
        self._open: dict[uuid.UUID, bool] = {}

    async def run(self, health: Health) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self.look()
                health.report(PART)
            except ReplicationError as error:
                if not error.retryable:
                    raise
                health.report(PART, critical=f"reports cannot be followed: {error}")
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """One round over all machines and windows."""
        for machine in await self._changed():
            async with self._database.writing() as session:
                await self._follow(session, machine)
        await self._windows()

    async def _changed(self) -> list[uuid.UUID]:
        """Machines for which something follows from what is known."""
        async with self._database.reading() as session:
            machines = (
                await session.scalars(
                    select(Machine).where(
                        (Machine.state != State.UNPROTECTED) | (Machine.points == REMOVING)
                    )
                )
            ).all()
            nodes = {node.id: node for node in await session.scalars(select(Node))}
            disks: dict[uuid.UUID, list[ProtectedDisk]] = {}
            for disk in await session.scalars(select(ProtectedDisk)):
                disks.setdefault(disk.machine_id, []).append(disk)
        return [
            machine.id
            for machine in machines
            if self._removed(machine, nodes)
            or self._observe(machine, disks.get(machine.id, []), nodes) != Observation()
            or self._orders(machine)
        ]

    async def _follow(self, session: AsyncSession, machine_id: uuid.UUID) -> None:
        machine = await lock_machine(session, machine_id)
        if machine is None:
            return
        now_ns = self._clock()
        ids = [node for node in (machine.id, machine.applier_id) if node is not None]
        nodes = {
            node.id: node for node in await session.scalars(select(Node).where(Node.id.in_(ids)))
        }
        disks = list(
            await session.scalars(
                select(ProtectedDisk).where(ProtectedDisk.machine_id == machine_id)
            )
        )
        tell: set[uuid.UUID] = set()
        if self._removed(machine, nodes) and machine.applier_id is not None:
            tell.add(machine.applier_id)
            forget_points(machine)
        observed = self._observe(machine, disks, nodes)
        for index, size in observed.sizes:
            next(disk for disk in disks if disk.index == index).size_bytes = size
            tell.add(machine.id)
        for happening in observed.happenings:
            before = machine.state
            enter(
                machine,
                happening.event,
                now_ns,
                cause=happening.cause or "",
                reason=happening.reason,
            )
            if happening.order:
                machine.resync_in_window = True
            elif happening.event in (Event.RESYNC_BEGUN, Event.RESYNC_DONE):
                machine.resync_in_window = False
            structlog.get_logger().info(
                "machine changes",
                machine=machine.name,
                before=before,
                state=machine.state,
                cause=machine.cause,
                reason=machine.reason,
            )
        if self._orders(machine):
            policy = await session.get(Policy, machine.policy_id)
            if policy is not None and resync_allowed(policy.resync_window, now_ns):
                machine.resync_request += 1
                machine.resync_in_window = False
                machine.revision += 1
                tell.add(machine.id)
        if tell:
            await self._ports.bump(session, sorted(tell))

    def _orders(self, machine: Machine) -> bool:
        """Whether the config server itself has to order a resync, once the window is open."""
        return machine.resync_in_window and machine.state in RESYNCING

    def _removed(self, machine: Machine, nodes: dict[uuid.UUID, Node]) -> bool:
        """Whether its points are gone that were left to be deleted when nobody waited for it."""
        if machine.points != REMOVING or machine.state != State.UNPROTECTED:
            return False
        if machine.applier_id is None:
            return True
        store = store_of(self._heard(nodes.get(machine.applier_id)), machine.id)
        return store is not None and store.removed

    def _observe(
        self, machine: Machine, disks: list[ProtectedDisk], nodes: dict[uuid.UUID, Node]
    ) -> Observation:
        heard = self._heard(nodes.get(machine.id))
        if heard is None or not isinstance(heard.report, MachineReport):
            return Observation()
        applier = nodes.get(machine.applier_id) if machine.applier_id else None
        return apply_report(
            _view(machine, disks),
            heard.report,
            store_of(self._heard(applier), machine.id),
            skew_ns=heard.report.time_ns - heard.seen_ns,
        )

    def _heard(self, node: Node | None) -> Heard | None:
        if node is None:
            return None
        newest = self._ports.newest(node.id)
        if node.report is None or (newest is not None and newest.seen_ns >= node.seen_ns):
            return newest
        return Heard(node.seen_ns, read_report(node.role, node.report))

    async def _windows(self) -> None:
        """Tell the agents whose policy's window has opened or closed since the last look."""
        now_ns = self._clock()
        async with self._database.reading() as session:
            policies = (await session.execute(select(Policy.id, Policy.resync_window))).all()
        is_open = {policy: resync_allowed(window, now_ns) for policy, window in policies}
        flipped = [policy for policy, now in is_open.items() if self._open.get(policy, now) != now]
        if flipped:
            async with self._database.writing() as session:
                await tell_users(session, self._ports, flipped)
        self._open = is_open


def _view(machine: Machine, disks: list[ProtectedDisk]) -> MachineView:
    return MachineView(
        State(machine.state),
        machine.since_ns,
        machine.cause,
        machine.resync_request,
        machine.resync_in_window,
        tuple(
            DiskView(disk.index, disk.device_id, disk.name, disk.size_bytes)
            for disk in disks
            if not disk.excluded
        ),
    )
