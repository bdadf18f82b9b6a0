"""What people ask of a failover that is up: to commit it, to take it back, another point.

Source: docs/RECOVERY.md §4, §8.
"""

import uuid
from typing import Any

from sqlalchemy import select

from appliance.config_server.protection.jobs import JobKind, new_job
from appliance.config_server.protection.machines import BusyError, lock_machine, refuse_busy
from appliance.config_server.protection.requests import Asking
from appliance.config_server.protection.table import Event, State, step
from appliance.config_server.protection.transition import enter
from appliance.config_server.recovery.choosing import refuse_missing_point
from appliance.config_server.recovery.room import refuse_full, refuse_held_points
from appliance.config_server.recovery.run import OPEN, FailoverKind, FailoverState
from appliance.config_server.recovery.workflows import STEPS
from appliance.config_server.store.recovery_tables import Failover
from appliance.config_server.store.schema import Job, Machine
from replication.errors import ConflictError, NotFoundError


async def commit(asking: Asking, failover: uuid.UUID, *, delete_points: bool = False) -> Job:
    """Let a failover's VM stand alone: there is no way back. ``delete_points``: of all points."""
    both = await _settled(asking, failover, Event.COMMIT_ASKED)
    if delete_points:
        await refuse_held_points(asking.session, both[1], asking.now_ns)
        await _refuse_open_tests(asking, both[1])
    return _follow_up(
        asking, both, Event.COMMIT_ASKED, JobKind.COMMIT, {"delete_points": delete_points}
    )


async def cancel(asking: Asking, failover: uuid.UUID) -> Job:
    """Take a failover back: its VM goes, the machine is protected again without a full copy."""
    both = await _settled(asking, failover, Event.CANCEL_ASKED)
    job = _follow_up(asking, both, Event.CANCEL_ASKED, JobKind.CANCEL_FAILOVER, {})
    both[0].state = FailoverState.CANCELLING
    return job


async def change_point(asking: Asking, failover: uuid.UUID, point: str) -> Job:
    """Make the VM from another point."""
    both = await _settled(asking, failover, Event.CHANGE_POINT_ASKED)
    await refuse_missing_point(asking, both[1], point)
    applier = both[1].applier_id
    await refuse_full(asking.session, [applier] if applier is not None else [])
    return _follow_up(
        asking, both, Event.CHANGE_POINT_ASKED, JobKind.CHANGE_POINT, {"point": point}
    )


async def find_failover(asking: Asking, failover: uuid.UUID) -> Failover:
    """Its row, locked. Raises NotFoundError."""
    row = await asking.session.scalar(
        select(Failover).where(Failover.id == failover).with_for_update()
    )
    if row is None:
        raise NotFoundError(
            f"there is no failover {failover}", hint="`understudy failover list` lists them"
        )
    return row


def refuse_at_work(row: Failover) -> None:
    if row.job_id is not None:
        raise BusyError(
            f"a job is at work on the failover of {row.machine}: {row.job_id}",
            hint=f"wait for it or cancel it: `understudy jobs {row.job_id} --follow`",
        )


async def _refuse_open_tests(asking: Asking, machine: Machine) -> None:
    """Raises ConflictError while VMs of tests read from the machine's points."""
    test = await asking.session.scalar(
        select(Failover.id).where(
            Failover.machine_id == machine.id,
            Failover.kind == FailoverKind.TEST,
            Failover.state.in_(OPEN),
        )
    )
    if test is not None:
        raise ConflictError(
            f"a test failover of {machine.name} needs its points: {test}",
            hint="clean it up first, or commit without deleting the points",
        )


async def _settled(asking: Asking, failover: uuid.UUID, event: Event) -> tuple[Failover, Machine]:
    """A failover that is up, or on its way back, with its machine: both locked, in this order."""
    known = await asking.session.get(Failover, failover)
    if known is not None:
        await lock_machine(asking.session, known.machine_id)
    row = await find_failover(asking, failover)
    machine = await asking.session.get_one(Machine, row.machine_id)
    if row.kind == FailoverKind.TEST:
        raise ConflictError(
            f"this is a test failover of {row.machine}", hint="a test is cleaned up"
        )
    refuse_at_work(row)
    if row.state not in (FailoverState.UP, FailoverState.CANCELLING):
        raise ConflictError(f"this failover of {row.machine} is {row.state}")
    await refuse_busy(asking.session, machine)
    step(State(machine.state), event, machine=machine.name)
    return row, machine


def _follow_up(
    asking: Asking,
    both: tuple[Failover, Machine],
    event: Event,
    kind: JobKind,
    request: dict[str, Any],
) -> Job:
    row, machine = both
    job = new_job(
        asking.session,
        kind,
        target_id=machine.id,
        target=machine.name,
        steps=STEPS[kind],
        request={"run": str(row.run_id), **request},
        asked_by=asking.who,
        now_ns=asking.now_ns,
    )
    enter(machine, event, asking.now_ns)
    machine.job_id = row.job_id = job.id
    row.revision += 1
    return job
