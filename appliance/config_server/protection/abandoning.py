"""Letting go of a machine whose job could not undo what it had begun: in a state from which people
can go on, whatever the defect was.

Nothing is asked of the table of states or of the nodes: what fails there is why this is needed.

Source: docs/CONTROL.md §9.
"""

from types import MappingProxyType

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.protection.jobs import JobKind
from appliance.config_server.protection.table import State
from appliance.config_server.protection.workflow import Left
from appliance.config_server.store.schema import Job, Machine

NOTHING_LEFT = "nothing names the job any more"
LOOK = "look at the machines and ask anew for what is wanted; tell the maintainers, with the log"

_WAYS_ON = MappingProxyType(
    {
        JobKind.PROTECT: "unprotect it: `understudy unprotect {name}`; then protect it again",
        JobKind.UNPROTECT: "unprotect it again: `understudy unprotect {name}`",
        JobKind.ADD_DISK: "see `understudy disks list {name}`, and add or exclude the disk again",
        JobKind.EXCLUDE_DISK: "see `understudy disks list {name}`, and add or exclude the disk "
        "again",
        JobKind.RESYNC: "order it again: `understudy resync {name} --now`",
    }
)


async def let_machine_go(session: AsyncSession, job: Job, now_ns: int) -> Left:
    """One that was being protected is left as one whose protection is to be ended: nodes may have
    been told of it, and only that tells them otherwise.
    """
    query = select(Machine).where(Machine.job_id == job.id).with_for_update()
    machine = await session.scalar(query)
    if machine is None:
        return Left(NOTHING_LEFT, LOOK)
    if machine.state == State.ENABLING:
        set_state(machine, State.DISABLING, now_ns)
    release_row(machine)
    known = (machine.id, machine.process_server_id, machine.applier_id)
    return Left(
        f"{machine.name} is {machine.state}",
        _WAYS_ON[JobKind(job.kind)].format(name=machine.name),
        frozenset(node for node in known if node is not None),
    )


def set_state(machine: Machine, state: State, now_ns: int) -> None:
    """Without asking the table."""
    machine.state, machine.since_ns = state, now_ns


def release_row(machine: Machine) -> None:
    """It is another job's to take; its agent may let writes go on."""
    machine.job_id = None
    machine.final_wanted = False
    machine.revision += 1
