"""Recovery as a part of the config server: what is done for failovers that no job is at work on.

Source: docs/RECOVERY.md §2, §4.
"""

import time
import uuid
from collections.abc import Callable

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.report_book import Heard, newest_of
from appliance.config_server.protection.workflow import Ports
from appliance.config_server.recovery.settling import (
    Hear,
    end_locks,
    locks_over,
    settle_one,
    unsettled,
)
from appliance.config_server.rounds import Trouble, apart, go_round
from appliance.config_server.store.engine import Database
from appliance.config_server.store.recovery_tables import Failover, RecoveredVm, StoredEvidence
from appliance.config_server.store.schema import Node
from daemon.service import Health

LOOK_SECONDS = 2.0
RELOOK_SECONDS = 60.0
"""After which a failover is looked at again although its compute node said nothing new."""

PRUNE_SECONDS = 600.0
EVIDENCE_DAYS = 90
"""How long consoles and screenshots are kept after their failover has ended."""

EVIDENCE_COUNT_MAX = 2048
"""Of all failovers together: the oldest go first."""

PRUNED_AT_ONCE_MAX = 100
PART = "recovery"
_DAY_NS = 86400 * 10**9


class Recovery:
    """Ends what is over: failovers whose VMs are gone, unneeded holds, locks, old evidence."""

    def __init__(
        self,
        database: Database,
        ports: Ports,
        clock: Callable[[], int],
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._ports = ports
        self._clock = clock
        self._now = now
        self._looked: dict[uuid.UUID, tuple[int, float]] = {}
        self._pruned_at = -PRUNE_SECONDS

    async def run(self, health: Health) -> None:
        """Until it is cancelled. Raises IntegrityError for a damaged database."""
        failing = "failovers cannot be looked after"
        await go_round(PART, self.look, health, LOOK_SECONDS, failing=failing)

    async def look(self) -> tuple[Trouble, ...]:
        """One round. Returns what cannot be gone on with: it holds up nothing else."""
        troubles: list[Trouble] = []
        for failover in await self._with_news():
            count = len(troubles)
            with apart(f"failover {failover}", troubles):
                await self._settle(failover)
            if len(troubles) > count:
                self._looked.pop(failover, None)  # looked at again in the next round
        with apart("locks of points", troubles):
            await self._end_locks()
        with apart("old evidence", troubles):
            await self._prune()
        return tuple(troubles)

    async def _settle(self, failover: uuid.UUID) -> None:
        async with self._database.writing() as session:
            tell = await settle_one(session, failover, self._hear(session), self._clock())
            await self._ports.bump(session, sorted(tell))

    async def _end_locks(self) -> None:
        async with self._database.reading() as session:
            over = await locks_over(session, self._clock())
        if over:
            async with self._database.writing() as session:
                await self._ports.bump(session, sorted(await end_locks(session, self._clock())))

    async def _prune(self) -> None:
        if self._now() - self._pruned_at >= PRUNE_SECONDS:
            async with self._database.writing() as session:
                if not await prune_evidence(session, self._clock()):
                    self._pruned_at = self._now()

    async def _with_news(self) -> list[uuid.UUID]:
        """Failovers that something may follow for: their compute node has spoken since."""
        found = []
        looked: dict[uuid.UUID, tuple[int, float]] = {}
        async with self._database.reading() as session:
            hear = self._hear(session)
            for failover in await unsettled(session):
                computes = await session.scalars(
                    select(RecoveredVm.compute_id).where(
                        RecoveredVm.failover_id == failover, RecoveredVm.gone_ns.is_(None)
                    )
                )
                heard = [await hear(compute) for compute in set(computes)]
                seen_ns = max((each.seen_ns for each in heard if each is not None), default=0)
                before, at = self._looked.get(failover, (-1, 0.0))
                if seen_ns != before or self._now() - at >= RELOOK_SECONDS:
                    found.append(failover)
                    before, at = seen_ns, self._now()
                looked[failover] = (before, at)
        self._looked = looked
        return found

    def _hear(self, session: AsyncSession) -> Hear:
        async def hear(node: uuid.UUID) -> Heard | None:
            row = await session.get(Node, node)
            newest = self._ports.newest(node)
            return newest if row is None else newest_of(row, newest)

        return hear


async def prune_evidence(session: AsyncSession, now_ns: int) -> int:
    """Delete what is too old, or too much; returns how many, some at a time."""
    before_ns = now_ns - EVIDENCE_DAYS * _DAY_NS
    over = select(Failover.id).where(Failover.ended_ns < before_ns)
    old = (
        select(StoredEvidence.vm_id)
        .where(StoredEvidence.failover_id.in_(over))
        .limit(PRUNED_AT_ONCE_MAX)
    )
    vms = list(await session.scalars(old))
    count = await session.scalar(select(func.count()).select_from(StoredEvidence)) or 0
    if not vms and count > EVIDENCE_COUNT_MAX:
        oldest = select(StoredEvidence.vm_id).order_by(StoredEvidence.heard_ns)
        excess = min(count - EVIDENCE_COUNT_MAX, PRUNED_AT_ONCE_MAX)
        vms = list(await session.scalars(oldest.limit(excess)))
    if vms:
        await session.execute(delete(StoredEvidence).where(StoredEvidence.vm_id.in_(vms)))
    return len(vms)
