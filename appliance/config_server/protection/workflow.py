"""What a durable job is made of: named steps, each one transaction or a wait.

A step that acts does so in one transaction together with its record, so it happens once. A step
that waits is asked again and again, and writes only when what it says changes. Both may be asked
anew after a crash. What cannot be done in a transaction is done outside of one, at least once.

Source: docs/CONTROL.md §9.
"""

import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.report_book import Heard, newest_of
from appliance.config_server.protection.jobs import JobError, JobKind
from appliance.config_server.store.schema import Job, Machine, Node
from replication.control.report import (
    ApplierReport,
    MachineReport,
    StoreReport,
)
from replication.errors import ReplicationError

Told = dict[uuid.UUID, int]
"""Versions of assignments by node."""


class StepFailedError(ReplicationError):
    """A job's step cannot be done; what it had begun is undone."""

    code = "step_failed"

    def __init__(self, message: str, *, code: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code  # type: ignore[misc]  # of what failed, not of the class


@dataclass(frozen=True, slots=True)
class Done:
    """The step has ended. ``note``: what came of it."""

    note: str = ""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The step is to be asked again. ``note``: what for."""

    note: str


@dataclass(frozen=True, slots=True)
class Ports:
    """What jobs need of the parts that know the nodes.

    bump:       count up the versions of nodes' assignments in this transaction.
    ensure_key: make a machine's data key if it has none.
    newest:     the newest report of a node, none when it was never heard.
    """

    bump: Callable[[AsyncSession, Iterable[uuid.UUID]], Awaitable[None]]
    ensure_key: Callable[[AsyncSession, uuid.UUID], Awaitable[None]]
    newest: Callable[[uuid.UUID], Heard | None]


@dataclass(frozen=True, slots=True)
class Scene:
    """What a step sees: rows of one transaction that nobody else changes meanwhile."""

    session: AsyncSession
    job: Job
    ports: Ports
    now_ns: int

    async def heard(self, node: uuid.UUID) -> Heard | None:
        """The newest report, in memory or from another config server that wrote it down."""
        row = await self.session.get(Node, node)
        newest = self.ports.newest(node)
        return newest if row is None else newest_of(row, newest)

    async def tell(self, *nodes: uuid.UUID | None) -> None:
        """Count up assignments, and remember up to which versions the job has to wait."""
        known = sorted({node for node in nodes if node is not None})
        if not known:
            return
        await self.ports.bump(self.session, known)
        versions = dict(self.job.request.get("versions", {}))
        for node in known:
            row = await self.session.get(Node, node, populate_existing=True)
            if row is not None:
                versions[str(node)] = row.assignment_version
        self.job.request = {**self.job.request, "versions": versions}

    async def has_heard(self, node: uuid.UUID) -> bool:
        """Whether the node follows what this job told it."""
        version = self.job.request.get("versions", {}).get(str(node), 0)
        heard = await self.heard(node)
        return heard is not None and heard.report.assignment >= version

    async def agent_of(self, machine: uuid.UUID) -> MachineReport | None:
        """An agent's report, once it follows what it was told."""
        heard = await self.heard(machine)
        if heard is None or not await self.has_heard(machine):
            return None
        return heard.report if isinstance(heard.report, MachineReport) else None


@dataclass(frozen=True, slots=True)
class MachineScene(Scene):
    """Of a job that owns one machine: its row, locked, which names the job."""

    machine: Machine

    async def agent(self) -> MachineReport | None:
        """The agent's report, once it follows what it was told."""
        return await self.agent_of(self.machine.id)

    async def store(self) -> StoreReport | None:
        """What the applier says of the machine."""
        if self.machine.applier_id is None:
            return None
        heard = await self.heard(self.machine.applier_id)
        return store_of(heard, self.machine.id)


def store_of(heard: Heard | None, machine: uuid.UUID) -> StoreReport | None:
    """A machine's part of its applier's report."""
    if heard is None or not isinstance(heard.report, ApplierReport):
        return None
    return next((store for store in heard.report.stores if store.machine == machine), None)


S = TypeVar("S", bound=Scene)


@dataclass(frozen=True, slots=True)
class Outside(Generic[S]):
    """The step has something done that is no matter of the database, and that may take long.

    do:   runs without a transaction, and is cancelled when the job is to be; what it returns writes
          down what came of it. Whatever it needs to know of an earlier attempt was written before.
    note: what is being done.
    """

    note: str
    do: Callable[[], Awaitable[Callable[[S], Awaitable[None]]]]


Verdict = Done | Waiting | Outside[Any]


@dataclass(frozen=True, slots=True)
class Step(Generic[S]):
    """name: what people see, and how a job's row and the code find each other over upgrades.
    late: what to say when a wait takes longer than nodes have to answer; empty: it goes on then.
    is_patient: it ends its waits by itself.
    """

    name: str
    act: Callable[[S], Awaitable[Verdict]]
    late: str = ""
    hint: str = ""
    is_patient: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """What a job leaves behind that could not be undone.

    told, action: what that is, and what a person is to do.
    tell:         nodes whose assignments are others now.
    """

    told: str
    action: str
    tell: frozenset[uuid.UUID] = frozenset()


@dataclass(frozen=True, slots=True)
class Workflow(Generic[S]):
    """A kind of job. ``succeed`` and ``undo`` end it, in the transaction that closes its row.

    open:    what the job owns; none when that is not the job's any more.
    nodes:   whose news its steps wait for.
    succeed: may say what has failed although all steps are done.
    abandon: where ``undo`` fails, again and again: let go of all that names the job, in a state
             from which people can go on. It relies on nothing but rows.
    find:    the step of a name, for a job whose steps are made for it; none: of ``steps`` alone.
    """

    kind: JobKind
    steps: tuple[Step[S], ...]
    open: Callable[[AsyncSession, Job, Ports, int], Awaitable[S | None]]
    nodes: Callable[[AsyncSession, Job], Awaitable[frozenset[uuid.UUID]]]
    succeed: Callable[[S], Awaitable[JobError | None]]
    undo: Callable[[S], Awaitable[None]]
    abandon: Callable[[AsyncSession, Job, int], Awaitable[Left]]
    find: Callable[[str], Step[S] | None] | None = None

    def step(self, name: str) -> Step[S]:
        """Raises StepFailedError for one that this version does not know any more."""
        for step in self.steps:
            if step.name == name:
                return step
        found = self.find(name) if self.find is not None else None
        if found is not None:
            return found
        raise StepFailedError(
            f"this version knows no step {name!r} of a job to {self.kind}",
            code="unknown_step",
            hint="the job is of another version: ask for it anew",
        )


Workflows = Mapping[JobKind, Workflow[Any]]


async def open_machine(
    session: AsyncSession, job: Job, ports: Ports, now_ns: int
) -> MachineScene | None:
    """The job's machine, while it names the job."""
    if job.target_id is None:
        return None
    machine = await session.scalar(
        select(Machine).where(Machine.id == job.target_id).with_for_update()
    )
    if machine is None or machine.job_id != job.id:
        return None
    return MachineScene(session, job, ports, now_ns, machine)


async def machine_nodes(session: AsyncSession, job: Job) -> frozenset[uuid.UUID]:
    """The nodes that the job's machine has to do with."""
    machine = await session.get(Machine, job.target_id) if job.target_id is not None else None
    if machine is None:
        return frozenset()
    known = (machine.id, machine.process_server_id, machine.applier_id)
    return frozenset(node for node in known if node is not None)


def machine_workflow(
    kind: JobKind,
    steps: tuple[Step[MachineScene], ...],
    succeed: Callable[[MachineScene], Awaitable[None]],
    undo: Callable[[MachineScene], Awaitable[None]],
    abandon: Callable[[AsyncSession, Job, int], Awaitable[Left]],
) -> Workflow[MachineScene]:
    """Of jobs that own one machine, and let go of it when they end."""

    def ending(end: Callable[[MachineScene], Awaitable[None]]) -> Callable[[MachineScene], Any]:
        async def released(scene: MachineScene) -> None:
            await end(scene)
            scene.machine.job_id = None
            scene.machine.revision += 1

        return released

    return Workflow(
        kind, steps, open_machine, machine_nodes, ending(succeed), ending(undo), abandon
    )
