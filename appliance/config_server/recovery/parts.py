"""What happens to one machine's part of a job: it fails, is taken back, is done.

Each of these is part of the transaction of a step, so that a machine that has failed is let go of
at once, while the others of its run go on.

Source: docs/RECOVERY.md §4.
"""

import uuid
from collections.abc import Awaitable, Callable, Iterable

from sqlalchemy import select

from appliance.config_server.protection.jobs import JobError
from appliance.config_server.protection.table import Event
from appliance.config_server.protection.transition import enter
from appliance.config_server.protection.workflow import (
    Done,
    StepFailedError,
    Verdict,
    Waiting,
)
from appliance.config_server.recovery.decisions import Bad, Good, Wait
from appliance.config_server.recovery.run import FailoverState, OnFailure
from appliance.config_server.recovery.scene import Part, RecoveryScene
from appliance.config_server.recovery.settling import end, nodes_of, remove_vms, settle
from appliance.config_server.store.recovery_tables import Failover, PointHold
from replication.control.recovery import HeldPoint

NAMES_TOLD_MAX = 5
PERHAPS_OFF = (
    "its vCenter was told to switch it off; look whether it is off, and switch it on again"
)
_ALIVE = (FailoverState.STARTING, FailoverState.UP)

Judge = Callable[[Part], Awaitable[Wait | Good | Bad]]


async def judge_each(
    scene: RecoveryScene, parts: Iterable[Part], judge: Judge, *, done: str = ""
) -> Verdict:
    """Wait until all are good; one that is bad has failed, and stops the run or does not.

    Raises StepFailedError where the run is to stop, or nothing is left of it.
    """
    waits: dict[str, list[str]] = {}
    failed: list[tuple[Part, Bad]] = []
    for part in parts:
        found = await judge(part)
        if isinstance(found, Wait):
            waits.setdefault(found.note, []).append(part.machine.name)
        elif isinstance(found, Bad):
            await fail_part(scene, part, found)
            failed.append((part, found))
    if failed:
        stop_or_go_on(scene, failed)
    if not waits:
        return Done(done)
    if not scene.plan.plan:
        return Waiting(next(iter(waits)))
    return Waiting("; ".join(f"{_named(names)}: {note}" for note, names in waits.items()))


def stop_or_go_on(scene: RecoveryScene, failed: list[tuple[Part, Bad]]) -> None:
    """Raises StepFailedError unless the run goes on without those that have failed."""
    if scene.plan.on_failure is OnFailure.CONTINUE and any(
        part.state in _ALIVE for part in scene.parts
    ):
        return
    part, bad = failed[0]
    others = f"; {len(failed) - 1} more failed" if len(failed) > 1 else ""
    raise StepFailedError(
        f"{part.machine.name}: {bad.message}{others}", code=bad.code, hint=bad.hint or None
    )


async def refuse_failed(scene: RecoveryScene) -> None:
    """Raises StepFailedError where a machine has failed before, and the run is to stop for it."""
    failed = await failed_of(scene)
    left = any(part.state in _ALIVE for part in scene.parts)
    if failed and not (scene.plan.on_failure is OnFailure.CONTINUE and left):
        row = failed[0]
        error = JobError.model_validate(row.error)
        raise StepFailedError(
            f"{row.machine}: {error.message}", code=error.code, hint=error.hint or None
        )


async def failed_of(scene: RecoveryScene) -> list[Failover]:
    """Failovers of the run that have come to nothing."""
    query = select(Failover).where(
        Failover.run_id == scene.run.id, Failover.state == FailoverState.FAILED
    )
    return list(await scene.session.scalars(query.order_by(Failover.group, Failover.machine)))


async def fail_part(scene: RecoveryScene, part: Part, bad: Bad) -> None:
    """It came to nothing: its VM and its hold go, its machine is protected as before."""
    part.failover.error = JobError(code=bad.code, message=bad.message, hint=bad.hint).model_dump()
    await take_back(scene, part, FailoverState.FAILED)


async def take_back(scene: RecoveryScene, part: Part, state: FailoverState) -> None:
    """Undo what a failover has begun. Its hold stays until its VM is gone."""
    tell = await remove_vms(scene.session, [part.failover.id])
    if not part.is_test:
        machine = part.machine
        if part.failover.powered_off_ns > 0:
            add_note(part.failover, "the source was switched off: switch it on again")
        elif part.failover.power_off_ns:
            add_note(part.failover, PERHAPS_OFF)
        enter(machine, Event.FAILOVER_FAILED, scene.now_ns)
        release(part)
        tell |= nodes_of(machine)
    end(part.failover, state, scene.now_ns)
    tell |= await settle(scene.session, [part.failover], scene.heard, scene.now_ns)
    await scene.tell(*tell)


async def fail_over(scene: RecoveryScene, part: Part) -> None:
    """Its VM is up: from now on that is the machine."""
    part.failover.job_id = None
    part.failover.revision += 1
    if not part.is_test:
        enter(part.machine, Event.FAILOVER_DONE, scene.now_ns)
        release(part)
        await scene.tell(*nodes_of(part.machine))


def add_note(failover: Failover, note: str) -> None:
    """Beside what people wrote."""
    failover.notes = "\n".join(filter(None, (failover.notes, note)))


def release(part: Part) -> None:
    """The machine is another job's to take; its agent may let writes go on."""
    part.machine.job_id = None
    part.machine.final_wanted = False
    part.machine.revision += 1


async def add_hold(
    scene: RecoveryScene, part: Part, choice: str, *, generation: int = 0, number: int = 0
) -> PointHold:
    """Ask the applier to hold a point. Raises StepFailedError for a machine without one."""
    if part.machine.applier_id is None:
        raise StepFailedError(f"{part.machine.name} has no applier", code="no_applier")
    hold = PointHold(
        id=uuid.uuid4(),
        machine_id=part.machine.id,
        applier_id=part.machine.applier_id,
        failover_id=part.failover.id,
        choice=choice,
        generation=generation,
        number=number,
        asked_by=scene.job.asked_by,
        created_ns=scene.now_ns,
    )
    scene.session.add(hold)
    await scene.session.flush()
    await scene.tell(hold.applier_id)
    return hold


def take_held(part: Part, hold: PointHold, held: HeldPoint) -> None:
    """Write down which point it is."""
    hold.answer = held.model_dump(mode="json")
    row = part.failover
    row.point, row.point_ns, row.consistency = held.point, held.time_ns, held.consistency
    row.revision += 1


def _named(names: list[str]) -> str:
    more = len(names) - NAMES_TOLD_MAX
    told = ", ".join(names[:NAMES_TOLD_MAX])
    return f"{told} and {more} more" if more > 0 else told
