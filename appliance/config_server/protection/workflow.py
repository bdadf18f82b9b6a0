"""What a durable job is made of: named steps, each one transaction or a wait.

A step that acts does so in one transaction together with its record, so it happens once. A step
that waits is asked again and again, and writes only when what it says changes. Both may be asked
anew after a crash.

Source: docs/CONTROL.md §9.
"""

import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.report_book import Heard, newest_of
from appliance.config_server.protection.jobs import JobKind
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


Verdict = Done | Waiting


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
    machine: Machine
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

    async def agent(self) -> MachineReport | None:
        """The agent's report, once it follows what it was told."""
        heard = await self.heard(self.machine.id)
        if heard is None or not await self.has_heard(self.machine.id):
            return None
        return heard.report if isinstance(heard.report, MachineReport) else None

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


@dataclass(frozen=True, slots=True)
class Step:
    """name: what people see, and how a job's row and the code find each other over upgrades.
    late: what to say when a wait takes longer than nodes have to answer; empty: it goes on then.
    """

    name: str
    act: Callable[[Scene], Awaitable[Verdict]]
    late: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Workflow:
    """A kind of job. ``succeed`` and ``undo`` end it, in the transaction that closes its row."""

    kind: JobKind
    steps: tuple[Step, ...]
    succeed: Callable[[Scene], Awaitable[None]]
    undo: Callable[[Scene], Awaitable[None]]

    def step(self, name: str) -> Step:
        """Raises StepFailedError for one that this version does not know any more."""
        for step in self.steps:
            if step.name == name:
                return step
        raise StepFailedError(
            f"this version knows no step {name!r} of a job to {self.kind}",
            code="unknown_step",
            hint="the job is of another version: ask for it anew",
        )
