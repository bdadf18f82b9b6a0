"""The newest report of each node: in memory at once, in the table every few seconds together.

A restart loses what was not written yet; the next report brings it.
"""

import asyncio
import contextlib
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass

import structlog
from sqlalchemy import bindparam, update

from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import Node
from replication.control.report import Report
from replication.errors import ReplicationError

FLUSH_SECONDS = 3.0
FLUSHED_AT_ONCE_MAX = 200
NODES_MAX = 16384
"""Reports held in memory; those that are longest silent go first."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A report and when it came, by the config server's clock."""

    seen_ns: int
    report: Report


class ReportBook:
    """Takes reports and writes them down."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._newest: OrderedDict[uuid.UUID, Heard] = OrderedDict()
        self._unwritten: dict[uuid.UUID, Heard] = {}

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
        """Write what is new; how many reports that were. What cannot be written stays."""
        written = 0
        while self._unwritten:
            some = dict(list(self._unwritten.items())[:FLUSHED_AT_ONCE_MAX])
            rows = [
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
            for node, heard in some.items():
                if self._unwritten.get(node) is heard:
                    del self._unwritten[node]
            written += len(some)
        return written

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self._try_flush()

    async def _try_flush(self) -> None:
        try:
            await self.flush()
        except ReplicationError as error:
            structlog.get_logger().warning("reports not written", reason=str(error))


_WRITE = (
    update(Node)
    .where(Node.id == bindparam("node"), Node.seen_ns <= bindparam("heard_ns"))
    .values(seen_ns=bindparam("heard_ns"), report=bindparam("document"))
)
"""Not over a newer one that another config server has written."""
