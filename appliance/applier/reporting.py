"""What the applier says of itself to the config server.

Source: docs/CONTROL.md §5.
"""

import asyncio
import importlib.metadata
import os
import time
import uuid

from appliance.applier.fleet import Fleet
from appliance.applier.measure import used_bytes
from appliance.applier.store.reader_store import ReaderStore
from daemon.load import LoadMeter
from daemon.service import Health
from daemon.troubles import clipped, troubles_of
from replication.bookmark import Consistency
from replication.control.report import ApplierReport, StoreReport
from replication.errors import ReplicationError


class Reporter:
    """Makes reports."""

    def __init__(self, store: str, fleet: Fleet, health: Health) -> None:
        self._store = store
        self._fleet = fleet
        self._health = health
        self._load = LoadMeter()
        self._started_ns = time.time_ns()
        self._software = importlib.metadata.version("understudy")

    async def report(self, assignment: int) -> ApplierReport:
        """The whole report of now; ``assignment`` is the version that is followed."""
        stores = []
        for machine, applier in list(self._fleet.appliers.items()):
            read = await asyncio.to_thread(read_store, self._store, machine)
            told = {"open_repairs": applier.open_repairs, "lost": clipped(applier.lost)}
            stores.append(read.model_copy(update=told))
        stores += [StoreReport(machine=machine, removed=True) for machine in self._fleet.removed]
        found = await asyncio.to_thread(os.statvfs, self._store)
        return ApplierReport(
            software=self._software,
            time_ns=time.time_ns(),
            started_ns=self._started_ns,
            assignment=assignment,
            load=self._load.read(),
            troubles=troubles_of(self._health),
            free_bytes=found.f_bavail * found.f_frsize,
            stores=tuple(stores),
        )


def read_store(root: str, machine: uuid.UUID) -> StoreReport:
    """What a machine's store holds; zeros while it cannot be read, of which the health tells."""
    reader = ReaderStore(root, machine)
    try:
        chain = reader.chain()
    except ReplicationError:
        return StoreReport(machine=machine)
    head = chain.points[-1].bookmark.stamp if chain.points else None
    floor = chain.folding_to or 0
    points = [
        point.bookmark
        for point in chain.points
        if point.bookmark.consistency.restorable and point.position >= floor
    ]
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
