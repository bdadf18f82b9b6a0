"""Versions of assignments, and who waits for the next one.

A version counts up in the transaction that changes what the node should do. Who waits in this
process wakes when that transaction is committed; a look at the table every second finds what other
config servers, and the commands on this host, have changed.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field

import structlog
from sqlalchemy import event, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import Node
from replication.control.role import NodeRole
from replication.errors import LimitError, ReplicationError

WAITERS_MAX = 4096
LOOK_SECONDS = 1.0
IDS_AT_ONCE_MAX = 500
_WAITERS_KEY = "understudy.waiters"


@dataclass(slots=True)
class Waiters:
    """Nodes whose question for a newer assignment is open, one each: the newest."""

    _events: dict[uuid.UUID, asyncio.Event] = field(default_factory=dict)

    @contextlib.contextmanager
    def waiting(self, node: uuid.UUID) -> Iterator[asyncio.Event]:
        """Within, the event is set when there may be news; an older question is ended by it.

        Raises LimitError when WAITERS_MAX nodes wait already.
        """
        older = self._events.pop(node, None)
        if older is not None:
            older.set()
        if len(self._events) >= WAITERS_MAX:
            raise LimitError(
                f"{WAITERS_MAX} nodes wait already", hint="try again", retry_after_seconds=5
            )
        news = self._events[node] = asyncio.Event()
        try:
            yield news
        finally:
            if self._events.get(node) is news:
                del self._events[node]

    def wake(self, nodes: Iterable[uuid.UUID]) -> None:
        for node in nodes:
            if node in self._events:
                self._events[node].set()

    @property
    def nodes(self) -> frozenset[uuid.UUID]:
        return frozenset(self._events)


class Versions:
    """Counts versions up and wakes who waits."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.waiters = Waiters()

    async def bump(self, session: AsyncSession, nodes: Iterable[uuid.UUID]) -> None:
        """Count up the versions of ``nodes`` in this transaction; unknown ones are passed over."""
        known = sorted(set(nodes))
        for start in range(0, len(known), IDS_AT_ONCE_MAX):
            some = known[start : start + IDS_AT_ONCE_MAX]
            await session.execute(
                update(Node)
                .where(Node.id.in_(some))
                .values(assignment_version=Node.assignment_version + 1)
            )
        self._wake_after_commit(session, known)

    async def bump_role(self, session: AsyncSession, role: NodeRole) -> None:
        """Count up the versions of all nodes of a role."""
        await self.bump(session, await session.scalars(select(Node.id).where(Node.role == role)))

    def _wake_after_commit(self, session: AsyncSession, nodes: list[uuid.UUID]) -> None:
        def wake(_: Session) -> None:
            self.waiters.wake(nodes)

        event.listen(session.sync_session, "after_commit", wake, once=True)

    @contextlib.asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Within, changes that others write are seen."""
        task = asyncio.create_task(self._look(), name="versions")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _look(self) -> None:
        known_sum = -1
        known: dict[uuid.UUID, int] = {}
        failing = False
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self.waiters.nodes:
                known_sum = -1
                continue
            try:
                async with self._database.reading() as session:
                    # Versions only grow, so their sum tells whether any has.
                    newer_sum = await session.scalar(select(func.sum(Node.assignment_version)))
                    if newer_sum == known_sum:
                        continue
                    rows = await session.execute(select(Node.id, Node.assignment_version))
                    newer = {node: version for node, version in rows}  # noqa: C416 - no pairs
            except ReplicationError as error:
                if not failing:
                    structlog.get_logger().warning("versions not read", reason=str(error))
                failing = True
                continue
            failing = False
            self.waiters.wake(node for node in newer if newer[node] != known.get(node))
            known, known_sum = newer, newer_sum or 0
