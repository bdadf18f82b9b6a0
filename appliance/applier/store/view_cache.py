"""Open views shared by all who read the same disk of the same point, and kept a little longer.

A machine that is removed takes its views with it, also those that somebody reads: open files would
keep what was to be deleted.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from replication.errors import ConfigError, StorageError

if TYPE_CHECKING:
    import uuid

    from appliance.applier.store.model import Point
    from appliance.applier.store.reader_store import ReaderStore
    from appliance.applier.store.view import View

    Key = tuple[uuid.UUID, int, int, int]

IDLE_VIEWS_MAX = 8
IDLE_SECONDS_MAX = 10.0
"""An idle view holds a pin, which keeps its point's layers from being folded: not for long."""


@dataclass(slots=True)
class _Shared:
    """reading: reads that are under way. gone: the machine is removed, the view is not read."""

    view: View
    users: int
    idle_since: float
    reading: int = 0
    gone: bool = False


class ViewCache:
    """Thread-safe; a view is closed when nobody uses it and it is old or one of too many."""

    def __init__(self) -> None:
        self._shared: OrderedDict[Key, _Shared] = OrderedDict()
        self._lock = threading.Lock()

    def acquire(self, store: ReaderStore, point: Point, disk: int) -> View:
        """Raises what ``ReaderStore.open_view`` raises; pair it with ``release``."""
        key = _key(store.machine, point, disk)
        with self._lock:
            shared = self._shared.get(key)
            if shared is None:
                view = store.open_view(point.position, disk)
                if _key(store.machine, view.point, disk) != key:
                    view.close()
                    raise ConfigError(
                        f"position {point.position} of machine {store.machine} is another one now",
                        hint="list its points: the store was put back or begun anew",
                    )
                shared = _Shared(view, 0, 0.0)
                self._shared[key] = shared
            shared.users += 1
            return shared.view

    def read(self, view: View, offset: int, length: int) -> bytes:
        """See View.read. Raises StorageError when the view's machine has been removed."""
        shared = self._shared[_key(view.machine, view.point, view.disk)]
        with self._lock:
            if shared.gone:
                raise StorageError(f"machine {view.machine} has been removed with its points")
            shared.reading += 1
        try:
            return view.read(offset, length)
        finally:
            self._end_read(shared)

    def _end_read(self, shared: _Shared) -> None:
        with self._lock:
            shared.reading -= 1
            if shared.gone and not shared.reading:
                shared.view.close()

    def drop_gone(self) -> None:
        """Let go of the views of machines that are no more."""
        with self._lock:
            for shared in self._shared.values():
                if not shared.gone and not os.path.isdir(shared.view.folder):
                    shared.gone = True
                    if not shared.reading:
                        shared.view.close()

    def release(self, view: View) -> None:
        key = _key(view.machine, view.point, view.disk)
        with self._lock:
            shared = self._shared[key]
            shared.users -= 1
            shared.idle_since = time.monotonic()
            self._shared.move_to_end(key)
        self.close_idle()

    def close_idle(self, *, idle_seconds_max: float = IDLE_SECONDS_MAX) -> None:
        """Close what has been idle too long, and the longest idle ones of too many."""
        now = time.monotonic()
        with self._lock:
            idle = [(key, shared) for key, shared in self._shared.items() if shared.users == 0]
            surplus = len(idle) - IDLE_VIEWS_MAX
            for nth, (key, shared) in enumerate(idle):
                if shared.gone or nth < surplus or now - shared.idle_since >= idle_seconds_max:
                    del self._shared[key]
                    if not shared.gone:
                        shared.view.close()

    def close(self) -> None:
        with self._lock:
            for shared in self._shared.values():
                if not shared.gone:
                    shared.view.close()
            self._shared.clear()


def _key(machine: uuid.UUID, point: Point, disk: int) -> Key:
    return machine, point.position, point.applied_ns, disk
