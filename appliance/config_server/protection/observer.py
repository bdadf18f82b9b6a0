"""Looking at what the nodes report: machines change state, resyncs are ordered.

A look reads rows and reports and decides (`observation`); where something follows, it decides again
in a transaction that holds the row, so that of two config servers one writes it.

Source: docs/CONTROL.md §9, §11.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.report_book import Heard, newest_of
from appliance.config_server.protection.machines import lock_machine, next_order
from appliance.config_server.protection.observation import (
    DiskView,
    Happening,
    MachineView,
    Observation,
    apply_report,
)
from appliance.config_server.protection.table import RESYNCING, Event, State
from appliance.config_server.protection.transition import REMOVING, enter, forget_points
from appliance.config_server.protection.window import resync_allowed
from appliance.config_server.protection.workflow import Ports, store_of
from appliance.config_server.rounds import Trouble, go_round
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import Machine, Node, Policy, ProtectedDisk
from daemon.service import Health
from replication.control.report import MachineReport
from replication.errors import IntegrityError, ReplicationError

LOOK_SECONDS = 2.0
READ_AT_ONCE_MAX = 200
PART = "protection"

_Signature = tuple[int, int, int]


class _Looked(Protocol):
    """What each look reads of every machine: a few columns, not the row as an object."""

    @property
    def id(self) -> uuid.UUID: ...
    @property
    def revision(self) -> int: ...
    @property
    def applier_id(self) -> uuid.UUID | None: ...


@dataclass(frozen=True, slots=True)
class _Row:
    """What a node's row held when its report was of ``seen_ns``; none that could be read: none."""

    seen_ns: int
    heard: Heard | None


class Observer:
    """Looks at all machines every LOOK_SECONDS; where there is no news, at their rows alone.

    defects: machines that could not be followed in the newest look, and why.
    """

    def __init__(self, database: Database, ports: Ports, clock: Callable[[], int]) -> None:
        self._database = database
        self._ports = ports
        self._clock = clock
        self._seen: dict[uuid.UUID, _Signature] = {}
        self._read: dict[uuid.UUID, _Row] = {}
        self.defects: dict[uuid.UUID, str] = {}
        self._told: frozenset[uuid.UUID] = frozenset()

    async def run(self, health: Health) -> None:
        """Until it is cancelled. A machine that cannot be followed does not keep the others."""

        async def look() -> list[Trouble]:
            await self.look()
            return [Trouble(f"reports of machine {one}", why) for one, why in self.defects.items()]

        await go_round(PART, look, health, LOOK_SECONDS, failing="following reports")

    async def look(self) -> None:
        """One round over all machines."""
        self.defects = {}
        for machine in await self._changed():
            with self._alone(machine):
                async with self._database.writing() as session:
                    await self._follow(session, machine)
        self._told = frozenset(self.defects)

    @contextmanager
    def _alone(self, machine: uuid.UUID) -> Iterator[None]:
        """Within, a defect is this machine's alone: told in full once, and by health while it
        lasts. A database that is away is no defect of a machine.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, IntegrityError):
                raise
            if isinstance(error, ReplicationError) and error.retryable:
                raise
            self._seen.pop(machine, None)  # looked at again in the next round
            self.defects[machine] = f"they cannot be followed: {error!r}"
            if machine not in self._told:
                structlog.get_logger().exception(
                    "a machine's reports cannot be followed", machine=str(machine)
                )

    async def _changed(self) -> list[uuid.UUID]:
        """Machines for which something follows from what is known."""
        async with self._database.reading() as session:
            rows = (await session.execute(_LOOKED_AT)).all()
            heard = await self._hear(session, rows)
            signatures = {row.id: _signature(row, heard) for row in rows}
            wanted = [
                row.id
                for row in rows
                if self._seen.get(row.id) != signatures[row.id] or row.resync_in_window
            ]
            news = await _machines(session, wanted)
            disks = await _disks(session, wanted)
        self._seen = signatures
        found = []
        for machine in news:
            with self._alone(machine.id):
                if (
                    _removed(machine, heard)
                    or _observe(machine, disks.get(machine.id, []), heard) != Observation()
                    or _orders(machine)
                ):
                    found.append(machine.id)
                    del self._seen[machine.id]
        return found

    async def _follow(self, session: AsyncSession, machine_id: uuid.UUID) -> None:
        machine = await lock_machine(session, machine_id)
        if machine is None:
            return
        now_ns = self._clock()
        heard = await self._hear(session, [machine])
        disks = (await _disks(session, [machine.id])).get(machine.id, [])
        tell: set[uuid.UUID] = set()
        if _removed(machine, heard):
            if machine.applier_id is not None:
                tell.add(machine.applier_id)
            forget_points(machine)
        observed = _observe(machine, disks, heard)
        for index, size in observed.sizes:
            next(disk for disk in disks if disk.index == index).size_bytes = size
            tell.add(machine.id)
        for happening in observed.happenings:
            _enter(machine, happening, now_ns)
        if _orders(machine):
            policy = await session.get(Policy, machine.policy_id)
            if policy is not None and resync_allowed(policy.resync_window, now_ns):
                machine.resync_request = next_order(machine, heard.get(machine.id))
                machine.resync_in_window = False
                machine.revision += 1
                tell.add(machine.id)
        if tell:
            await self._ports.bump(session, sorted(tell))

    async def _hear(
        self, session: AsyncSession, machines: Sequence[_Looked | Machine]
    ) -> dict[uuid.UUID, Heard]:
        """The newest reports of the machines' agents and appliers: what we heard ourselves, or what
        another config server wrote down.
        """
        wanted = {machine.id for machine in machines}
        wanted |= {machine.applier_id for machine in machines if machine.applier_id is not None}
        rows = await session.execute(select(Node.id, Node.seen_ns).where(Node.seen_ns > 0))
        heard = {}
        for node, seen_ns in rows:
            known = self._ports.newest(node)
            if node in wanted and (known is None or known.seen_ns < seen_ns):
                row = self._read.get(node)
                if row is None or row.seen_ns != seen_ns:
                    row = self._read[node] = await _read_row(session, node)
                known = row.heard or known
            if known is not None:
                heard[node] = known
        for node in wanted - heard.keys():
            newest = self._ports.newest(node)
            if newest is not None:
                heard[node] = newest
        return heard


async def _read_row(session: AsyncSession, node: uuid.UUID) -> _Row:
    row = await session.get_one(Node, node)
    return _Row(row.seen_ns, newest_of(row, None))


async def _machines(session: AsyncSession, machines: Sequence[uuid.UUID]) -> list[Machine]:
    found: list[Machine] = []
    for some in _pieces(machines):
        found += await session.scalars(select(Machine).where(Machine.id.in_(some)))
    return found


async def _disks(
    session: AsyncSession, machines: Sequence[uuid.UUID]
) -> dict[uuid.UUID, list[ProtectedDisk]]:
    found: dict[uuid.UUID, list[ProtectedDisk]] = {}
    for some in _pieces(machines):
        query = select(ProtectedDisk).where(ProtectedDisk.machine_id.in_(some))
        for disk in await session.scalars(query):
            found.setdefault(disk.machine_id, []).append(disk)
    return found


def _pieces(machines: Sequence[uuid.UUID]) -> Iterator[Sequence[uuid.UUID]]:
    for start in range(0, len(machines), READ_AT_ONCE_MAX):
        yield machines[start : start + READ_AT_ONCE_MAX]


def _signature(machine: _Looked | Machine, heard: Mapping[uuid.UUID, Heard]) -> _Signature:
    agent = heard.get(machine.id)
    applier = heard.get(machine.applier_id) if machine.applier_id else None
    return (
        machine.revision,
        agent.seen_ns if agent else 0,
        applier.seen_ns if applier else 0,
    )


def _enter(machine: Machine, happening: Happening, now_ns: int) -> None:
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


def _orders(machine: Machine) -> bool:
    """Whether the config server itself has to order a resync, once the window is open."""
    return machine.resync_in_window and machine.state in RESYNCING


def _removed(machine: Machine, heard: Mapping[uuid.UUID, Heard]) -> bool:
    """Whether its points are gone that were left to be deleted when nobody waited for it."""
    if machine.points != REMOVING or machine.state not in (State.UNPROTECTED, State.COMMITTED):
        return False
    if machine.applier_id is None:
        return True
    store = store_of(heard.get(machine.applier_id), machine.id)
    return store is not None and store.removed


def _observe(
    machine: Machine, disks: Sequence[ProtectedDisk], heard: Mapping[uuid.UUID, Heard]
) -> Observation:
    agent = heard.get(machine.id)
    if agent is None or not isinstance(agent.report, MachineReport):
        return Observation()
    applier = heard.get(machine.applier_id) if machine.applier_id else None
    view = MachineView(
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
    return apply_report(
        view,
        agent.report,
        store_of(applier, machine.id),
        skew_ns=agent.report.time_ns - agent.seen_ns,
    )


_LOOKED_AT = select(
    Machine.id, Machine.revision, Machine.applier_id, Machine.resync_in_window
).where((Machine.state != State.UNPROTECTED) | (Machine.points == REMOVING))
