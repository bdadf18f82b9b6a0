"""The audit log: who changed what, and who was refused.

Refusals can be caused by anybody who reaches the port, and by a node without end, so only so many
of those a minute are written; the next one that is written tells how many were left out.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.caller import Caller
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import AuditEntry

DONE = "done"
REFUSALS_PER_MINUTE_MAX = 60
NAME_CHARS_MAX = 255
_MINUTE_NS = 60 * 10**9


class Audit:
    """Writes audit entries. Times are of ``clock``."""

    def __init__(self, database: Database, clock: Callable[[], int]) -> None:
        self._database = database
        self._clock = clock
        self._minute_ns = 0
        self._written = 0
        self._left_out = 0

    def add(
        self,
        session: AsyncSession,
        caller: Caller,
        action: str,
        target: str,
        *,
        outcome: str = DONE,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Have ``session``'s transaction carry an entry."""
        session.add(
            AuditEntry(
                at_ns=self._clock(),
                who=_stored(caller.name),
                role=str(caller.role or ""),
                source=_stored(caller.source),
                action=_stored(action),
                target=_stored(target),
                outcome=outcome,
                detail=dict(detail or {}),
            )
        )

    async def write(
        self,
        caller: Caller,
        action: str,
        target: str,
        *,
        outcome: str = DONE,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """An entry in a transaction of its own."""
        async with self._database.writing() as session:
            self.add(session, caller, action, target, outcome=outcome, detail=detail)

    async def refused(self, caller: Caller, action: str, target: str, outcome: str) -> None:
        """That somebody was not let in, unless too many were in this minute."""
        now_ns = self._clock()
        if now_ns - self._minute_ns >= _MINUTE_NS:
            self._minute_ns, self._written = now_ns, 0
        if self._written >= REFUSALS_PER_MINUTE_MAX:
            self._left_out += 1
            return
        self._written += 1
        left_out, self._left_out = self._left_out, 0
        detail = {"left_out_before": left_out} if left_out else None
        await self.write(caller, action, target, outcome=outcome, detail=detail)


def _stored(text: str) -> str:
    """As a column takes it; PostgreSQL has no NUL."""
    return text.replace("\0", "\\0")[:NAME_CHARS_MAX]
