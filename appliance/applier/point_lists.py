"""Lists of recovery points for people: made of a store, told to the config server when they change.

What is told may be old by the time that somebody chooses from it. So nothing is decided by it: a
hold takes the point, or says that it is not there any more.

Source: docs/RECOVERY.md §2.
"""

import asyncio
import os
import time
import uuid
from collections.abc import Callable, Collection, Sequence

import structlog
import xxhash

from appliance.applier.measure import used_bytes
from appliance.applier.store.catalogue import Chain
from appliance.applier.store.holds import HeldPosition, Mark, marks_of, read_holds
from appliance.applier.store.model import Point
from appliance.applier.store.point_names import point_name
from appliance.applier.store.reader_store import ReaderStore, recovery_points
from daemon.control_client import ControlClient
from daemon.troubles import clipped
from replication.control.assignment import ApplierAssignment
from replication.control.recovery import POINTS_MAX, ListedPoint, PointList
from replication.errors import ReplicationError, UnavailableError

LIST_BYTES_MAX = 960 << 10
"""Of a list as JSON: the config server takes 1 MiB in one request."""

REASON_CHARACTERS_MAX = 200
TELL_AGAIN_SECONDS = 3600.0
"""After this one that has not changed is told again: a config server may have been put back."""

FIRST_SECONDS = 3.0
"""Between two looks at a machine that has no recovery point yet: people wait for the first one."""

PAUSE_SECONDS = 0.05
"""Between two lists: a config server takes so many requests a second from one source."""

_log = structlog.get_logger()


def list_points(
    machine: uuid.UUID,
    chain: Chain,
    holds: Sequence[HeldPosition],
    *,
    now_ns: int,
    space_bytes: int = 0,
) -> PointList:
    """All recovery points, oldest first; the newest ones where they are too many for one list."""
    newest = recovery_points(chain)[-POINTS_MAX:]
    marks = marks_of(newest, holds, now_ns)
    points = [_listed(point, marks.get(point.position, Mark())) for point in newest]
    made = PointList(machine=machine, space_bytes=space_bytes, points=tuple(points))
    while points and (size_bytes := len(made.model_dump_json().encode())) > LIST_BYTES_MAX:
        too_many = -(-len(points) * (size_bytes - LIST_BYTES_MAX) // size_bytes)
        points = points[max(1, too_many) :]
        made = made.model_copy(update={"points": tuple(points)})
    return made


def _listed(point: Point, mark: Mark) -> ListedPoint:
    bookmark = point.bookmark
    return ListedPoint(
        name=point_name(point),
        position=point.position,
        time_ns=max(0, bookmark.time_ns),
        applied_ns=max(0, point.applied_ns),
        consistency=bookmark.consistency.value,
        reason=clipped(bookmark.reason)[:REASON_CHARACTERS_MAX],
        changed_bytes=point.changed_bytes,
        verified_ns=point.verified_ns or 0,
        held=mark.held,
        locked_until_ns=mark.locked_until_ns,
    )


def read_list(root: str, machine: uuid.UUID) -> PointList:
    """The list of a machine as its store is now. Raises what reading a store raises."""
    reader = ReaderStore(root, machine)
    return list_points(
        machine,
        reader.chain(),
        read_holds(reader.folder),
        now_ns=time.time_ns(),
        space_bytes=used_bytes(reader.folder),
    )


class PointTeller:
    """Tells the config server the lists that have changed. What fails is tried again later."""

    def __init__(
        self,
        control: ControlClient[ApplierAssignment],
        root: str,
        machines: Callable[[], Collection[uuid.UUID]],
        seconds: float,
    ) -> None:
        """machines: those that have a store here; seconds: between two looks at one with points."""
        self._control = control
        self._root = root
        self._machines = machines
        self._seconds = seconds
        self._told: dict[uuid.UUID, tuple[bytes, float]] = {}
        self._look_at: dict[uuid.UUID, float] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            machines = self._machines()
            self._told = {one: told for one, told in self._told.items() if one in machines}
            self._look_at = {one: at for one, at in self._look_at.items() if one in machines}
            try:
                for machine in sorted(machines):
                    if time.monotonic() >= self._look_at.get(machine, 0.0):
                        await self._tell(machine)
            except UnavailableError as error:
                _log.debug("lists of points wait", reason=str(error))
            await asyncio.sleep(min(self._seconds, FIRST_SECONDS))

    async def _tell(self, machine: uuid.UUID) -> None:
        """Raises UnavailableError while the config server is away: it is looked at again soon."""
        try:
            made = await asyncio.to_thread(read_list, self._root, machine)
        except (ReplicationError, OSError) as error:  # of which the health tells
            _log.debug("no list of points", machine=str(machine), reason=str(error))
            self._look_at[machine] = time.monotonic() + self._seconds
            return
        digest = xxhash.xxh3_128_digest(made.model_dump_json().encode())
        before, again_at = self._told.get(machine, (b"", 0.0))
        look_at = time.monotonic() + (self._seconds if made.points else 0.0)
        if digest == before and time.monotonic() < again_at:
            self._look_at[machine] = look_at
            return
        try:
            await self._control.put_points(made)
        except UnavailableError:
            raise
        except ReplicationError as error:
            _log.debug("list of points not taken", machine=str(machine), reason=str(error))
            look_at = time.monotonic() + self._seconds
        else:
            self._told[machine] = (digest, time.monotonic() + TELL_AGAIN_SECONDS)
        self._look_at[machine] = look_at
        await asyncio.sleep(PAUSE_SECONDS)


def machines_with_points(root: str, machines: Collection[uuid.UUID]) -> list[uuid.UUID]:
    """Those of ``machines`` of which the store at ``root`` holds something."""
    return [one for one in machines if os.path.isdir(ReaderStore(root, one).folder)]
