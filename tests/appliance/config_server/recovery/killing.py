"""A process that runs jobs of recovery in children and has them kill themselves; see the one of
protection for how.

``python -m tests.appliance.config_server.recovery.killing FOLDER``
"""

from typing import Any

from sqlalchemy import select

from appliance.config_server.protection.jobs import JobKind
from appliance.config_server.recovery.follow_up import cancel, change_point, commit
from appliance.config_server.recovery.requests import begin_run, clean_up
from appliance.config_server.recovery.run import (
    ActionKind,
    FailoverKind,
    RunAction,
    RunGroup,
    RunMachine,
    RunPlan,
)
from appliance.config_server.store.recovery_tables import (
    Failover,
    PlanAction,
    PointHold,
    RecoveredVm,
)
from appliance.config_server.store.schema import Job, Machine, Node
from tests.appliance.config_server.protection.killing import (
    NEVER,
    Place,
    Play,
    Trap,
    command,
    sprung,
)
from tests.appliance.config_server.protection.stage import MACHINE
from tests.appliance.config_server.recovery.stage import RecoveryStage, open_recovery

KINDS = [
    JobKind.FAILOVER,
    JobKind.CLEANUP,
    JobKind.COMMIT,
    JobKind.CANCEL_FAILOVER,
    JobKind.CHANGE_POINT,
]
"""A test failover has steps of a failover and no other ones."""

ACTION = RunAction(name="announce", kind=ActionKind.SCRIPT)


def plan() -> RunPlan:
    """A machine and what is done after it."""
    return RunPlan(
        plan="shop", groups=(RunGroup(machines=(RunMachine(id=MACHINE),), after=(ACTION,)),)
    )


async def prepare(place: Place, kind: JobKind) -> None:
    """Bring a machine to where the job starts."""
    trap = Trap(NEVER)
    async with open_recovery(place.folder, place.url, boundary=trap) as stage:
        await stage.protected()
        if kind is JobKind.CLEANUP:
            await stage.failed_over(FailoverKind.TEST)
        elif kind is not JobKind.FAILOVER:
            await stage.failed_over(FailoverKind.PLANNED)
        await sprung(
            trap, 1 if kind is JobKind.FAILOVER else 2
        )  # else their workflows would be run again by each copy


async def ask(stage: RecoveryStage, kind: JobKind) -> Job:
    """Ask for the job."""
    async with stage.asking() as asking:
        if kind is JobKind.FAILOVER:
            return await begin_run(asking, FailoverKind.PLANNED, plan())
        failover = (await asking.session.scalars(select(Failover.id))).one()
        if kind is JobKind.CLEANUP:
            return await clean_up(asking, failover)
        if kind is JobKind.COMMIT:
            return await commit(asking, failover, delete_points=True)
        if kind is JobKind.CANCEL_FAILOVER:
            return await cancel(asking, failover)
        return await change_point(asking, failover, "old")


async def begin(place: Place, kind: JobKind, trap: Trap) -> dict[str, Any]:
    """Ask for the job and see it to its end, unless the trap springs."""
    async with open_recovery(place.folder, place.url, boundary=trap) as stage:
        job = await ask(stage, kind)
        await stage.protection.begin(job.id)
        told = await outcome(stage, kind)
        await sprung(trap)
        return {**told, "boundaries": trap.seen}


async def go_on(place: Place, kind: JobKind) -> dict[str, Any]:
    """What a config server does that starts again."""
    async with open_recovery(place.folder, place.url) as stage:
        return await outcome(stage, kind)


async def outcome(stage: RecoveryStage, kind: JobKind) -> dict[str, Any]:
    """What came of it. Attempts of actions are aside: those that are begun again count up."""
    async with stage.database.reading() as session:
        job = (await session.scalars(select(Job).where(Job.kind == kind))).one()
    job = await stage.ended(job.id)
    async with stage.database.reading() as session:
        machine = await session.get_one(Machine, MACHINE)
        failovers = await session.scalars(select(Failover).order_by(Failover.asked_ns))
        holds = await session.scalars(select(PointHold).order_by(PointHold.created_ns))
        vms = await session.scalars(select(RecoveredVm).order_by(RecoveredVm.created_ns))
        actions = await session.scalars(select(PlanAction))
        nodes = await session.scalars(select(Node).order_by(Node.name))
        return {
            "state": job.state,
            "error": job.error,
            "steps": [step["state"] for step in job.steps],
            "machine": [machine.state, machine.points, machine.job_id, machine.final_wanted],
            "orders": machine.final_order,
            "failovers": [
                [row.state, row.point, row.job_id, bool(row.up_ns), bool(row.ended_ns)]
                for row in failovers
            ],
            "holds": [[row.choice, bool(row.ended_ns)] for row in holds],
            "vms": [[row.wanted, row.independent, bool(row.gone_ns)] for row in vms],
            "actions": [[row.name, row.state, row.attempt > 0] for row in actions],
            "versions": [node.assignment_version for node in nodes],
        }


def worth(seen: list[str]) -> list[int]:
    """Those with a durable write between them and the one before."""
    return [
        number
        for number, name in enumerate(seen, 1)
        if name == "before 0" or not name.startswith("before")
    ]


if __name__ == "__main__":
    command(Play(prepare, begin, go_on, worth), KINDS, JobKind.CLEANUP)
