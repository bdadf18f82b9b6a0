"""What the applier says of itself to the config server.

Source: docs/CONTROL.md §5.
"""

import asyncio
import importlib.metadata
import os
import time
import uuid
from collections.abc import Collection

from appliance.applier.fleet import Fleet
from appliance.applier.held_points import answer_on_disk, fitting, tell
from appliance.applier.holding import Answer
from appliance.applier.machine import MachineApplier
from appliance.applier.measure import used_bytes
from appliance.applier.store.reader_store import ReaderStore, recovery_points
from daemon.load import LoadMeter
from daemon.service import Health
from daemon.troubles import clipped, troubles_of
from replication.bookmark import Consistency
from replication.control.assignment import ApplierAssignment
from replication.control.recovery import HeldPoint, Hold
from replication.control.report import ApplierReport, StoreReport
from replication.errors import ReplicationError


class Reporter:
    """Makes reports."""

    def __init__(self, store: str, fleet: Fleet, health: Health) -> None:
        self._store = store
        self._fleet = fleet
        self._health = health
        self._load = LoadMeter()
        self._count = 0
        self._started_ns = time.time_ns()
        self._software = importlib.metadata.version("understudy")

    async def report(self, assignment: ApplierAssignment | None) -> ApplierReport:
        """The whole report of now; ``assignment`` is the one that is followed."""
        stores = []
        for machine, applier in list(self._fleet.appliers.items()):
            read = await asyncio.to_thread(read_store, self._store, machine)
            told = {"open_repairs": applier.open_repairs, "lost": clipped(applier.lost)}
            stores.append(read.model_copy(update=told))
        refused = sorted(self._fleet.refused)
        stores += [await asyncio.to_thread(read_store, self._store, one) for one in refused]
        stores += [StoreReport(machine=machine, removed=True) for machine in self._fleet.removed]
        self._count += 1
        found = await asyncio.to_thread(os.statvfs, self._store)
        return ApplierReport(
            software=self._software,
            time_ns=time.time_ns(),
            started_ns=self._started_ns,
            assignment=assignment.version if assignment else 0,
            load=self._load.read(),
            troubles=troubles_of(self._health),
            free_bytes=found.f_bavail * found.f_frsize,
            stores=tuple(stores),
            holds=fitting(await self._holds(assignment), self._count),
        )

    async def _holds(self, assignment: ApplierAssignment | None) -> list[HeldPoint]:
        if assignment is None:
            return []
        known = {machine.id for machine in assignment.machines}
        told = []
        for hold in assignment.holds:
            applier = self._fleet.appliers.get(hold.machine)
            answer = (applier.answers or {}).get(hold.id) if applier else None
            if answer is None:
                # What was held before is held, whether or not the store can be opened now.
                otherwise = self._unanswered(hold, known, applier)
                answer = await asyncio.to_thread(answer_on_disk, self._store, hold, otherwise)
            told.append(tell(hold, answer))
        return told

    def _unanswered(
        self, hold: Hold, known: Collection[uuid.UUID], applier: MachineApplier | None
    ) -> Answer:
        if hold.machine not in known:
            return Answer.refuses(f"this applier has no machine {hold.machine}")
        if applier is None:
            return Answer.waits("the machine's store is not open: its data key is not here")
        told = (self._health.criticals, self._health.warnings)
        why = "; ".join(troubles[applier.part] for troubles in told if applier.part in troubles)
        return Answer.waits(why or "nobody has looked at it yet")


def read_store(root: str, machine: uuid.UUID) -> StoreReport:
    """What a machine's store holds; zeros while it cannot be read, of which the health tells."""
    reader = ReaderStore(root, machine)
    try:
        chain = reader.chain()
    except ReplicationError:
        return StoreReport(machine=machine)
    head = chain.points[-1].bookmark.stamp if chain.points else None
    points = [point.bookmark for point in recovery_points(chain)]
    times = [max(0, bookmark.time_ns) for bookmark in points]
    app = [bookmark.time_ns for bookmark in points if bookmark.consistency is Consistency.APP]
    return StoreReport(
        machine=machine,
        generation=head.generation if head else 0,
        applied=head.number if head else 0,
        point_count=len(points),
        oldest_ns=min(times, default=0),
        newest_ns=max(times, default=0),
        newest_app_ns=max(app, default=0),
        space_bytes=used_bytes(reader.folder),
    )
