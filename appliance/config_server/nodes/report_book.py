"""The newest report of each node: in memory at once, in the table every few seconds together.

A restart loses what was not written yet; the next report brings it.
"""

import asyncio
import contextlib
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import bindparam, exc, update

from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import Node
from replication.control.report import Report, read_report
from replication.errors import ConflictError, InputError, ReplicationError

FLUSH_SECONDS = 3.0
FLUSHED_AT_ONCE_MAX = 200
NODES_MAX = 16384
"""Reports held in memory; those that are longest silent go first."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A report and when it came, by the config server's clock."""

    seen_ns: int
    report: Report


def newest_of(row: Node, heard: Heard | None) -> Heard | None:
    """Of what this config server has heard and what stands in the node's row, the newer one. What
    is stored and cannot be read is none.
    """
    if row.report is None or (heard is not None and heard.seen_ns >= row.seen_ns):
        return heard
    stored = read_report(row.report)
    return Heard(row.seen_ns, stored) if stored is not None else heard


class ReportBook:
    """Takes reports and writes them down."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._newest: OrderedDict[uuid.UUID, Heard] = OrderedDict()
        self._unwritten: dict[uuid.UUID, Heard] = {}
        self._refused: set[uuid.UUID] = set()

    def put(self, node: uuid.UUID, report: Report, now_ns: int) -> None:
        heard = Heard(now_ns, report)
        self._newest[node] = self._unwritten[node] = heard
        self._newest.move_to_end(node)
        if len(self._newest) > NODES_MAX:
            oldest, _ = self._newest.popitem(last=False)
            self._unwritten.pop(oldest, None)

    def newest(self, node: uuid.UUID) -> Heard | None:
        """What this config server has heard; another one's is in the table."""
        return self._newest.get(node)

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Within, what comes is written every FLUSH_SECONDS, and the rest at the end."""
        task = asyncio.create_task(self._keep_writing(), name="reports")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self._try_flush()

    async def flush(self) -> int:
        """Write what is new; how many reports that were. What cannot be written now stays; what
        never can be is dropped, and told once for each node.
        """
        written = 0
        while self._unwritten:
            some = dict(list(self._unwritten.items())[:FLUSHED_AT_ONCE_MAX])
            try:
                await self._write(some)
                refused = {}
            except _HOPELESS:
                refused = await self._write_each(some)
            self._tell(some, refused)
            for node, heard in some.items():
                if self._unwritten.get(node) is heard:
                    del self._unwritten[node]
            written += len(some) - len(refused)
        return written

    async def _write(self, some: Mapping[uuid.UUID, Heard]) -> None:
        rows: list[dict[str, Any]] = [
            {
                "node": node,
                "heard_ns": heard.seen_ns,
                "document": heard.report.model_dump(mode="json"),
            }
            for node, heard in some.items()
        ]
        async with self._database.writing() as session:
            connection = await session.connection()
            await connection.execute(_WRITE, rows)

    async def _write_each(self, some: Mapping[uuid.UUID, Heard]) -> dict[uuid.UUID, Exception]:
        """One by one, so that none suffers from another; why those were refused that were."""
        refused: dict[uuid.UUID, Exception] = {}
        for node, heard in some.items():
            try:
                await self._write({node: heard})
            except _HOPELESS as error:
                refused[node] = error
        return refused

    def _tell(
        self, some: Mapping[uuid.UUID, Heard], refused: Mapping[uuid.UUID, Exception]
    ) -> None:
        for node, error in refused.items():
            if node not in self._refused:
                structlog.get_logger().error(
                    "a report cannot be stored and is dropped",
                    node=str(node),
                    reason=f"{error}".partition("\n")[0],
                )
        self._refused = (self._refused - some.keys()) | refused.keys()

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self._try_flush()

    async def _try_flush(self) -> None:
        try:
            await self.flush()
        except ReplicationError as error:
            structlog.get_logger().warning("reports not written", reason=str(error))


_HOPELESS = (InputError, ConflictError, exc.StatementError, ValueError, TypeError, OverflowError)
"""Not cured by trying again: the database takes no such value, or its driver cannot express it."""

_WRITE = (
    update(Node)
    .where(Node.id == bindparam("node"), Node.seen_ns <= bindparam("heard_ns"))
    .values(seen_ns=bindparam("heard_ns"), report=bindparam("document"))
)
"""Not over a newer one that another config server has written."""
