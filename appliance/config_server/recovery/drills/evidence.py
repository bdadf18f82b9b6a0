"""What is written into a drill's report: read from rows, before and after all is cleaned up.

Source: docs/RECOVERY.md §6, §7.
"""

import base64
import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.protection.jobs import JobState, find_job, steps_of
from appliance.config_server.recovery.decisions import rpo_seconds, rto_seconds
from appliance.config_server.recovery.drills.report import (
    CONSOLE_CHARACTERS_MAX,
    SCREENSHOTS_BYTES_MAX,
    ActionEvidence,
    CleanupEvidence,
    DrillDocument,
    FileSystemEvidence,
    MachineEvidence,
    StepEvidence,
)
from appliance.config_server.recovery.run import FailoverState
from appliance.config_server.store.recovery_tables import (
    DrillReport,
    Failover,
    PlanAction,
    PlanRun,
    RecoveredVm,
    StoredEvidence,
)
from appliance.config_server.store.schema import Job
from replication.control.recovery import EvidenceKind, VmReport

_NS = 10**9


@dataclass(frozen=True, slots=True)
class Found:
    """A drill's run as it was when its job had ended. ``unseen``: machines that are up, whose
    screenshot has not come yet.
    """

    document: DrillDocument
    unseen: int


async def gather(session: AsyncSession, drill: DrillReport, run: PlanRun, job: Job) -> Found:
    """The report but for its cleanup."""
    rows = (
        await session.scalars(
            select(Failover)
            .where(Failover.run_id == run.id)
            .order_by(Failover.group, Failover.machine)
        )
    ).all()
    machines, left_out, unseen, room = [], [], 0, SCREENSHOTS_BYTES_MAX
    for row in rows:
        one = await _machine(session, row)
        if one.passed and not one.screenshot:
            unseen += 1
        room -= len(one.screenshot)
        if room < 0:
            room += len(one.screenshot)
            left_out.append(row.machine)
            one = one.model_copy(update={"screenshot": ""})
        machines.append(one)
    actions = [
        _action(row)
        for row in await session.scalars(
            select(PlanAction)
            .where(PlanAction.run_id == run.id)
            .order_by(PlanAction.group, PlanAction.place.desc(), PlanAction.index)
        )
    ]
    passed = job.state == JobState.SUCCEEDED and all(one.passed for one in machines)
    times = [one.rto_seconds for one in machines if one.rto_seconds is not None]
    remarks = (f"left out for their size: screenshots of {', '.join(left_out)}",) * bool(left_out)
    document = DrillDocument(
        id=str(drill.id),
        of="plan" if run.plan else "machine",
        target=drill.target,
        schedule=drill.schedule,
        asked_by=drill.asked_by,
        notes=run.notes,
        point=rows[0].choice if rows else "",
        network=rows[0].network if rows else "",
        passed=passed,
        reason="" if passed else _reason(job, machines),
        began_ns=drill.began_ns,
        run_ended_ns=job.ended_ns or 0,
        rto_seconds=max(times) if passed and times else None,
        run=str(run.id),
        job=job.id,
        machines=tuple(machines),
        actions=tuple(actions),
        steps=_steps(job),
        remarks=remarks,
    )
    return Found(document, unseen)


def without_evidence(drill: DrillReport, run: PlanRun, job: Job, reason: str) -> DrillDocument:
    """The report of a drill of which no more can be read than that it was: it has not passed."""
    return DrillDocument(
        id=str(drill.id),
        of="plan" if run.plan else "machine",
        target=drill.target,
        schedule=drill.schedule,
        asked_by=drill.asked_by,
        notes=run.notes,
        passed=False,
        reason=reason,
        began_ns=drill.began_ns,
        run_ended_ns=job.ended_ns or 0,
        run=str(run.id),
        job=job.id,
    )


async def cleanup_of(session: AsyncSession, job_id: str) -> CleanupEvidence:
    """What came of a cleanup that has ended."""
    job = await find_job(session, job_id)
    return CleanupEvidence(state=job.state, error=_error(job.error), steps=_steps(job))


async def _machine(session: AsyncSession, row: Failover) -> MachineEvidence:
    vm = await session.get(RecoveredVm, row.vm_id) if row.vm_id else None
    report = VmReport.model_validate(vm.report) if vm is not None and vm.report else None
    check = report.check if report is not None else None
    kept = await _kept(session, row.vm_id)
    console = kept.get(EvidenceKind.CONSOLE, b"").decode(errors="replace").replace("\0", "\ufffd")
    told = ""
    if check is not None:
        told = check.detail or ("passed" if check.passed else "did not pass")
    return MachineEvidence(
        machine=row.machine,
        group=row.group + 1,
        state=row.state,
        passed=row.state == FailoverState.UP and (check is None or check.passed),
        point=row.point,
        point_ns=row.point_ns,
        consistency=row.consistency,
        rto_seconds=rto_seconds(row.asked_ns, row.up_ns),
        rpo_seconds=rpo_seconds(row.asked_source_ns, row.point_ns),
        guest=report.guest if report is not None else "",
        address=report.address if report is not None else "",
        check=told,
        script_exit=check.script_exit if check is not None else None,
        script_output=check.output if check is not None else "",
        file_systems=tuple(
            FileSystemEvidence(**each.model_dump())
            for each in (check.file_systems if check is not None else ())
        ),
        error=_error(row.error),
        console=console[-CONSOLE_CHARACTERS_MAX:],
        screenshot=base64.b64encode(kept.get(EvidenceKind.SCREENSHOT, b"")).decode(),
    )


async def _kept(session: AsyncSession, vm: uuid.UUID | None) -> dict[str, bytes]:
    found = await session.scalars(select(StoredEvidence).where(StoredEvidence.vm_id == vm))
    return {row.kind: row.content for row in found}


def _action(row: PlanAction) -> ActionEvidence:
    return ActionEvidence(
        group=row.group + 1,
        place=row.place,
        name=row.name,
        kind=row.kind,
        state=row.state,
        attempt=row.attempt,
        exit_code=row.exit_code,
        detail=row.detail or "",
        output=row.output or "",
        seconds=(row.ended_ns - row.began_ns) / _NS if row.ended_ns and row.began_ns else None,
        resumed_by=row.resumed_by or "",
        note=row.note or "",
    )


def _steps(job: Job) -> tuple[StepEvidence, ...]:
    return tuple(
        StepEvidence(
            name=step.name,
            state=step.state,
            note=step.note,
            seconds=(step.ended_ns - step.started_ns) / _NS
            if step.ended_ns and step.started_ns
            else None,
        )
        for step in steps_of(job)
    )


def _error(error: dict[str, Any] | None) -> str:
    return str(error.get("message", "")) if error else ""


def _reason(job: Job, machines: list[MachineEvidence]) -> str:
    """Why it did not pass, in a sentence."""
    if job.error:
        return _error(job.error)
    if job.state == JobState.CANCELLED:
        return "it was cancelled"
    names = [one.machine for one in machines if not one.passed]
    return f"these did not pass: {', '.join(names)}"
