"""Which compute node a run gets, and whether there is room for all that it brings.

All machines of a run go to one compute node: its networks are there.

Source: docs/RECOVERY.md §3, §4.
"""

import uuid
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.report_book import Heard
from appliance.config_server.protection.machines import (
    HEARD_SECONDS_MAX,
    has_live_certificate,
    heard_of,
    lock_placement,
)
from appliance.config_server.protection.placement import Candidate, choose
from appliance.config_server.protection.workflow import Ports
from appliance.config_server.recovery.run import FailoverState, RunMachine
from appliance.config_server.store.recovery_tables import Failover, PointHold, RecoveredVm
from appliance.config_server.store.schema import Machine, Node
from replication.control.recovery import HOLDS_MAX, VMS_MAX
from replication.control.report import ComputeReport
from replication.control.role import NodeRole
from replication.errors import ConflictError

LOCKS_MAX = HOLDS_MAX // 2
"""Per applier; the other holds are for failovers."""

_MIB = 1 << 20
_SECOND_NS = 10**9


async def choose_compute(
    session: AsyncSession,
    ports: Ports,
    machines: Sequence[RunMachine],
    asked: str | None,
    now_ns: int,
) -> uuid.UUID:
    """The one that is asked for by id or name, else the emptiest that has room.

    Until the transaction ends nobody else takes that room. Raises PlacementError.
    """
    await lock_placement(session)
    taken = await _taken(session)
    memory = sum(machine.options.memory_bytes for machine in machines)
    nodes = await session.execute(
        select(Node, has_live_certificate(now_ns)).where(Node.role == NodeRole.COMPUTE)
    )
    known = [
        candidate(
            node.id,
            node.name,
            heard_of(ports, node),
            taken.get(node.id, (0, 0)),
            (len(machines), memory),
            is_live=is_live,
            now_ns=now_ns,
        )
        for node, is_live in nodes.all()
    ]
    return choose(known, asked, what="compute node").id


def candidate(
    node: uuid.UUID,
    name: str,
    heard: Heard | None,
    taken: tuple[int, int],
    wanted: tuple[int, int],
    *,
    is_live: bool,
    now_ns: int,
) -> Candidate:
    """A compute node, and why it does not get the run. Pure.

    taken, wanted: a count of VMs and their memory in bytes.
    """
    count, memory = taken
    return Candidate(
        node,
        name,
        machine_count=count,
        trouble=_trouble(heard, taken, wanted, now_ns)
        if is_live
        else "its certificate is not good",
        is_live=is_live,
        fill_share=memory / heard.report.load.memory_bytes
        if heard is not None and heard.report.load.memory_bytes
        else 0.0,
    )


def _trouble(
    heard: Heard | None, taken: tuple[int, int], wanted: tuple[int, int], now_ns: int
) -> str:
    if heard is None or not isinstance(heard.report, ComputeReport):
        return "it has never reported"
    silent = (now_ns - heard.seen_ns) // _SECOND_NS
    if silent > HEARD_SECONDS_MAX:
        return f"it was last heard of {silent} s ago"
    for part in heard.report.troubles:
        if part.severity == "critical":
            return f"{part.part}: {part.reason}"
    count, memory = (have + more for have, more in zip(taken, wanted, strict=True))
    total = heard.report.load.memory_bytes
    if total and memory > total:
        return (
            f"the VMs would have {memory // _MIB} MiB of memory together, "
            f"and it has {total // _MIB} MiB"
        )
    if count > VMS_MAX:
        return f"it has {taken[0]} VMs, and can have {VMS_MAX}"
    return ""


async def _taken(session: AsyncSession) -> Mapping[uuid.UUID, tuple[int, int]]:
    """VMs that are there or are ordered, and their memory, by compute node."""
    found: dict[uuid.UUID, tuple[int, int]] = {}

    def add(node: uuid.UUID, document: Mapping[str, object]) -> None:
        count, memory = found.get(node, (0, 0))
        asked = document.get("memory_bytes", 0)
        found[node] = (count + 1, memory + (asked if isinstance(asked, int) else 0))

    there = select(RecoveredVm.compute_id, RecoveredVm.document)
    for row in await session.execute(there.where(RecoveredVm.gone_ns.is_(None))):
        add(row.compute_id, row.document)
    coming = select(Failover.compute_id, Failover.options).where(
        Failover.state == FailoverState.STARTING, Failover.vm_id.is_(None)
    )
    for row in await session.execute(coming):
        add(row.compute_id, row.options)
    return found


async def refuse_full(session: AsyncSession, appliers: Iterable[uuid.UUID]) -> None:
    """Raises ConflictError where an applier would have to hold more points than it can.

    Each of ``appliers`` stands for one more hold.
    """
    more: dict[uuid.UUID, int] = {}
    for applier in appliers:
        more[applier] = more.get(applier, 0) + 1
    for applier, count in more.items():
        held = await session.scalar(
            select(func.count())
            .select_from(PointHold)
            .where(PointHold.applier_id == applier, PointHold.ended_ns.is_(None))
        )
        if (held or 0) + count > HOLDS_MAX:
            raise ConflictError(
                f"the applier holds {held} points, and can hold {HOLDS_MAX}",
                hint="clean up test failovers, or let locks run out",
            )


async def refuse_more_locks(session: AsyncSession, applier: uuid.UUID) -> None:
    """Raises ConflictError where locks would leave an applier too little for failovers."""
    locked = await session.scalar(
        select(func.count())
        .select_from(PointHold)
        .where(
            PointHold.applier_id == applier,
            PointHold.ended_ns.is_(None),
            PointHold.failover_id.is_(None),
        )
    )
    if (locked or 0) >= LOCKS_MAX:
        raise ConflictError(
            f"{locked} points of the applier are locked, and {LOCKS_MAX} can be",
            hint="let locks run out: the rest is for failovers",
        )


async def refuse_held_points(session: AsyncSession, machine: Machine, now_ns: int) -> None:
    """Raises ConflictError while a lock says that points of the machine must stay."""
    lock = await session.scalar(
        select(PointHold).where(
            PointHold.machine_id == machine.id,
            PointHold.failover_id.is_(None),
            PointHold.ended_ns.is_(None),
            PointHold.until_ns > now_ns,
        )
    )
    if lock is not None:
        raise ConflictError(
            f"the point {lock.choice} of {machine.name} is locked by {lock.asked_by}",
            hint="its points can be deleted when all locks are over; keep them until then",
        )
