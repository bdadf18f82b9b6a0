"""What nodes put: an applier lists of points, a compute node consoles and screenshots.

Each may speak only of what is its own: the machines and virtual machines of its assignment.

Source: docs/RECOVERY.md §2, §3, §8.
"""

import uuid
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.report_book import Heard
from appliance.config_server.store.recovery_tables import (
    PointHold,
    RecoveredVm,
    StoredEvidence,
    StoredPoints,
)
from appliance.config_server.store.schema import Machine
from replication.control.recovery import (
    EVIDENCE_BYTES_MAX,
    EvidenceKind,
    ListedPoint,
    PointList,
)
from replication.control.report import ApplierReport
from replication.errors import AccessError, InputError

_PNG = b"\x89PNG\r\n\x1a\n"


async def take_points(
    session: AsyncSession, applier: uuid.UUID, points: PointList, now_ns: int
) -> None:
    """Keep the newest list of a machine's points. Raises AccessError for another's machine."""
    machine = await session.scalar(
        select(Machine).where(Machine.id == points.machine).with_for_update()
    )
    if machine is None or machine.applier_id != applier:
        raise AccessError(f"the machine {points.machine} is not assigned to this applier")
    await session.merge(
        StoredPoints(
            machine_id=machine.id,
            applier_id=applier,
            heard_ns=now_ns,
            document=points.model_dump(mode="json"),
        )
    )


async def take_evidence(
    session: AsyncSession,
    compute: uuid.UUID,
    vm: uuid.UUID,
    kind: EvidenceKind,
    content: bytes,
    *,
    now_ns: int,
) -> None:
    """Keep a console or screenshot. Raises AccessError for a VM that is not this compute node's,
    InputError for what is none.
    """
    if len(content) > EVIDENCE_BYTES_MAX:
        raise InputError(f"content: {len(content)} bytes are more than {EVIDENCE_BYTES_MAX}")
    if kind is EvidenceKind.SCREENSHOT and not content.startswith(_PNG):
        raise InputError("content: a screenshot is a PNG")
    row = await session.scalar(
        select(RecoveredVm).where(RecoveredVm.id == vm, RecoveredVm.gone_ns.is_(None))
    )
    if row is None or row.compute_id != compute:
        raise AccessError(f"the virtual machine {vm} is not in this compute node's assignment")
    await session.merge(
        StoredEvidence(
            vm_id=vm,
            kind=kind,
            failover_id=row.failover_id,
            heard_ns=now_ns,
            content=content,
        )
    )


async def stored_points(session: AsyncSession, machine: Machine) -> Sequence[ListedPoint]:
    """The points as its applier has listed them last, oldest first.

    A list of another applier, of before the machine was protected anew, counts as none.
    """
    stored = await session.get(StoredPoints, machine.id)
    if stored is None or stored.applier_id != machine.applier_id:
        return []
    return PointList.model_validate(stored.document).points


async def listed_points(
    session: AsyncSession, machine: Machine, heard: Heard | None
) -> Sequence[ListedPoint]:
    """The points, the newest first, with what is known to hold them since they were listed.

    heard: the applier's newest report.
    """
    points = await stored_points(session, machine)
    said = heard.report.holds if heard and isinstance(heard.report, ApplierReport) else ()
    at_applier = {held.id for held in said if held.state == "held"}
    holds = await session.scalars(
        select(PointHold).where(PointHold.machine_id == machine.id, PointHold.ended_ns.is_(None))
    )
    locked: dict[str, int] = {}
    held = set()
    for hold in holds:
        if hold.failover_id is None and hold.id in at_applier:
            locked[hold.choice] = hold.until_ns
        elif hold.answer is not None:
            held.add(hold.answer["point"])
    return [
        point.model_copy(
            update={
                "held": point.held or point.name in held,
                "locked_until_ns": max(point.locked_until_ns, locked.get(point.name, 0)),
            }
        )
        for point in sorted(points, key=lambda point: -point.position)
    ]
