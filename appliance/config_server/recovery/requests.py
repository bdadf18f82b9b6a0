"""What people ask of recovery: each is one transaction that checks, writes what is wanted, and adds
the job that does it.

Source: docs/RECOVERY.md §4, §8.
"""

import uuid
from collections.abc import Sequence

from sqlalchemy import select

from appliance.config_server.discovery.matching import vm_of
from appliance.config_server.protection.jobs import JobKind, find_job, is_open, new_job
from appliance.config_server.protection.machines import (
    agent_report,
    heard_of,
    lock_machine,
    refuse_busy,
)
from appliance.config_server.protection.requests import Asking
from appliance.config_server.protection.table import TESTABLE, Event, State, step
from appliance.config_server.protection.transition import REMOVING, enter
from appliance.config_server.recovery.choosing import (
    NETWORK,
    refuse_missing_point,
    refuse_shared_network,
)
from appliance.config_server.recovery.decisions import point_of
from appliance.config_server.recovery.follow_up import find_failover, refuse_at_work
from appliance.config_server.recovery.parts import add_note
from appliance.config_server.recovery.room import choose_compute, refuse_full
from appliance.config_server.recovery.run import (
    ActionState,
    FailoverKind,
    FailoverState,
    RunGroup,
    RunMachine,
    RunPlan,
)
from appliance.config_server.recovery.workflows import STEPS, steps_of_run
from appliance.config_server.store.recovery_tables import Failover, PlanAction, PlanRun
from appliance.config_server.store.schema import Job, Machine, Node
from replication.errors import ConflictError, InputError, NotFoundError

TEST_NETWORK = "test-{}"
NOTES_CHARACTERS_MAX = 4000
CLOCK_OFF_NS_MAX = 86400 * 10**9


class NotTestableError(ConflictError):
    """There are no points of the machine to try in this state."""


async def begin_failover(
    asking: Asking,
    kind: FailoverKind,
    machine: RunMachine,
    *,
    network: str | None = None,
    compute: str | None = None,
    notes: str = "",
    drill: uuid.UUID | None = None,
) -> Job:
    """Fail a machine over alone."""
    plan = RunPlan(groups=(RunGroup(machines=(machine,)),))
    return await begin_run(
        asking, kind, plan, network=network, compute=compute, notes=notes, drill=drill
    )


async def begin_run(
    asking: Asking,
    kind: FailoverKind,
    plan: RunPlan,
    *,
    network: str | None = None,
    compute: str | None = None,
    notes: str = "",
    drill: uuid.UUID | None = None,
) -> Job:
    """Begin a failover or test failover of all machines of a plan.

    network: of the compute node; none: its `default` one, or one that is made for this test.
    compute: a compute node by name or id; none: the emptiest.
    drill:   the drill that it is part of.
    """
    session, now_ns = asking.session, asking.now_ns
    wanted = [machine for group in plan.groups for machine in group.machines]
    rows = await _lock_all(asking, wanted)
    for row in rows.values():
        await _refuse(asking, kind, row)
    for machine in wanted:
        await refuse_missing_point(asking, rows[machine.id], point_of(kind, machine))
    await refuse_full(session, [row.applier_id for row in rows.values() if row.applier_id])
    compute_id = await choose_compute(session, asking.ports, wanted, compute, now_ns)
    if network is not None:
        await refuse_shared_network(session, kind, compute_id, network)
    run = PlanRun(
        id=uuid.uuid4(),
        plan=plan.plan,
        kind=kind,
        document=plan.model_dump(mode="json"),
        job_id="",
        asked_by=asking.who,
        asked_ns=now_ns,
        notes=notes,
        drill_id=drill,
    )
    job = new_job(
        session,
        JobKind.TEST_FAILOVER if kind is FailoverKind.TEST else JobKind.FAILOVER,
        target_id=None if plan.plan else wanted[0].id,
        target=plan.plan or rows[wanted[0].id].name,
        steps=steps_of_run(kind, plan),
        request={"run": str(run.id), "kind": kind.value},
        asked_by=asking.who,
        now_ns=now_ns,
    )
    run.job_id = job.id
    session.add(run)
    await session.flush()
    default = TEST_NETWORK.format(run.id.hex[:8]) if kind is FailoverKind.TEST else NETWORK
    for number, group in enumerate(plan.groups):
        for machine in group.machines:
            row = rows[machine.id]
            if kind is not FailoverKind.TEST:
                enter(row, Event.FAILOVER_ASKED, now_ns)
                row.job_id = job.id
            session.add(
                Failover(
                    id=uuid.uuid4(),
                    run_id=run.id,
                    machine_id=row.id,
                    machine=row.name,
                    group=number,
                    kind=kind,
                    state=FailoverState.STARTING,
                    job_id=job.id,
                    choice=point_of(kind, machine),
                    options=machine.options.model_dump(mode="json"),
                    compute_id=compute_id,
                    network=network or default,
                    asked_ns=now_ns,
                    asked_source_ns=await _source_time(asking, row),
                )
            )
    return job


async def clean_up(asking: Asking, failover: uuid.UUID, *, notes: str = "") -> Job:
    """Have all of a test failover go; the notes stay. Also of a failover that was committed, when
    its machine is committed no more.
    """
    row = await find_failover(asking, failover)
    machine = await asking.session.get_one(Machine, row.machine_id)
    _refuse_cleanup(row, machine)
    run = await asking.session.get_one(PlanRun, row.run_id)
    return _clean_up(asking, run, [row], target=row.machine, target_id=row.machine_id, notes=notes)


async def clean_up_run(asking: Asking, run: uuid.UUID, *, notes: str = "") -> Job:
    """Have all test failovers of a run go."""
    row = await asking.session.get(PlanRun, run)
    if row is None:
        raise NotFoundError(f"there is no run {run}")
    if row.kind != FailoverKind.TEST:
        raise ConflictError("only a test is cleaned up", hint="commit failovers, or take them back")
    query = select(Failover).where(
        Failover.run_id == run, Failover.state.in_((*_CLEANABLE, FailoverState.STARTING))
    )
    found = list(await asking.session.scalars(query.order_by(Failover.id).with_for_update()))
    if not found:
        raise ConflictError("nothing is left of the run to clean up")
    for each in found:
        refuse_at_work(each)
    row.notes = "\n".join(filter(None, (row.notes, notes)))
    return _clean_up(asking, row, found, target=row.plan or found[0].machine, target_id=None)


async def resume(asking: Asking, job_id: str, *, note: str = "") -> Job:
    """A manual action is done: its job goes on. Raises ConflictError where none waits."""
    job = await find_job(asking.session, job_id, lock=True)
    action = None
    if is_open(job) and "run" in job.request:
        action = await asking.session.scalar(
            select(PlanAction)
            .where(
                PlanAction.run_id == uuid.UUID(job.request["run"]),
                PlanAction.state == ActionState.WAITING,
            )
            .with_for_update()
        )
    if action is None:
        raise ConflictError(f"job {job_id} does not wait for anybody")
    action.state = ActionState.DONE
    action.ended_ns = asking.now_ns
    action.resumed_by, action.note = asking.who, note
    job.updated_ns = asking.now_ns
    return job


_CLEANABLE = (FailoverState.UP, FailoverState.CLEANING)


def _refuse_cleanup(row: Failover, machine: Machine) -> None:
    refuse_at_work(row)
    is_test = row.kind == FailoverKind.TEST and row.state in _CLEANABLE
    is_left = (
        row.kind != FailoverKind.TEST
        and row.state in (FailoverState.COMMITTED, FailoverState.CLEANING)
        and machine.state != State.COMMITTED
    )
    if not is_test and not is_left:
        raise ConflictError(
            f"there is nothing to clean up of this {row.kind} failover of {row.machine}: "
            f"it is {row.state}",
            hint="only a test is cleaned up, and once; a failover is committed or taken back",
        )


def _clean_up(
    asking: Asking,
    run: PlanRun,
    rows: Sequence[Failover],
    *,
    target: str,
    target_id: uuid.UUID | None,
    notes: str = "",
) -> Job:
    job = new_job(
        asking.session,
        JobKind.CLEANUP,
        target_id=target_id,
        target=target,
        steps=STEPS[JobKind.CLEANUP],
        request={"run": str(run.id)},
        asked_by=asking.who,
        now_ns=asking.now_ns,
    )
    for row in rows:
        row.state, row.job_id = FailoverState.CLEANING, job.id
        row.revision += 1
        if notes:
            add_note(row, notes)
    return job


async def _lock_all(asking: Asking, wanted: Sequence[RunMachine]) -> dict[uuid.UUID, Machine]:
    """All machines of a run, locked in the order of their ids."""
    ids = [machine.id for machine in wanted]
    if not ids:
        raise InputError("the plan has no machines", hint="put at least one into a group")
    twice = {machine for machine in ids if ids.count(machine) > 1}
    if twice:
        raise InputError(f"machine {min(twice)} is in the plan twice")
    rows = {}
    for machine in sorted(ids):
        row = await lock_machine(asking.session, machine)
        if row is None:
            raise ConflictError(
                f"machine {machine} is not protected", hint="protect it, or take it out of the plan"
            )
        rows[machine] = row
    return rows


async def _refuse(asking: Asking, kind: FailoverKind, machine: Machine) -> None:
    """Raises ConflictError for what cannot happen to the machine now."""
    if kind is FailoverKind.TEST:
        if machine.state not in TESTABLE or machine.points == REMOVING:
            raise NotTestableError(
                f"cannot test the failover of {machine.name}: it is {machine.state}",
                hint="a test needs recovery points of a machine that is protected or failed over",
            )
        return
    await refuse_busy(asking.session, machine)
    step(State(machine.state), Event.FAILOVER_ASKED, machine=machine.name)
    node = await asking.session.get_one(Node, machine.id)
    machine.vm_id = await vm_of(asking.session, node) or machine.vm_id
    if kind is not FailoverKind.PLANNED:
        return
    if machine.state != State.PROTECTED:
        raise ConflictError(
            f"cannot fail over {machine.name} as planned: it is {machine.state}",
            hint="let it resynchronise first, or fail over unplanned to an older point",
        )
    if machine.vm_id is None:
        raise ConflictError(
            f"{machine.name} is in no vCenter's inventory: it cannot be switched off from here",
            hint="add its vCenter; or switch it off and fail over unplanned",
        )
    await agent_report(asking.ports, node, asking.now_ns)


async def _source_time(asking: Asking, machine: Machine) -> int:
    """What the source's clock says now, as far as its agent has told; else, and where that is off
    by more than a day, ours.
    """
    heard = heard_of(asking.ports, await asking.session.get_one(Node, machine.id))
    if heard is None or abs(heard.report.time_ns - heard.seen_ns) > CLOCK_OFF_NS_MAX:
        return asking.now_ns
    return heard.report.time_ns + max(0, asking.now_ns - heard.seen_ns)
