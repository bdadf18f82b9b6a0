"""What a machine without a config server is told of resyncs.

When one that is necessary may begin is configured: ``at once``, or ``window 22:00-06:00`` in the
machine's own time; a window may pass midnight. That somebody wants one now is a file beside the
agent's state, which goes when the order is taken up.
"""

import contextlib
import datetime as dt
import os
import re
from dataclasses import dataclass

from daemon.durable import storage_error, sync_folder, write_whole
from replication.control.assignment import ResyncOrder

ORDER_FILE = "resync.order"
_WINDOW = re.compile(r"window ([0-9]{2}:[0-9]{2})-([0-9]{2}:[0-9]{2})")
AT_ONCE = "at once"


@dataclass(frozen=True, slots=True)
class Leave:
    """Begin and end of the window by the clock on the wall; the same twice: always."""

    begin: dt.time
    end: dt.time

    @classmethod
    def parse(cls, text: str) -> "Leave":
        """Raise ValueError for what is neither form."""
        if text == AT_ONCE:
            return cls(dt.time(0), dt.time(0))
        found = _WINDOW.fullmatch(text)
        try:
            begin, end = (dt.time.fromisoformat(part) for part in found.groups() if found)  # type: ignore[union-attr]
        except (ValueError, AttributeError) as error:
            raise ValueError('"at once" or "window HH:MM-HH:MM" is expected') from error
        if begin == end:
            raise ValueError("a window ends at another time than it begins")
        return cls(begin, end)

    def is_open(self, now: dt.time) -> bool:
        if self.begin < self.end:
            return self.begin <= now < self.end
        return now >= self.begin or now < self.end

    def order(self, now: dt.datetime, folder: str, carried_out: int) -> ResyncOrder:
        """What a config server would say at ``now``; ``carried_out`` is the newest request."""
        return ResyncOrder(
            request=carried_out + is_ordered(folder), allowed=self.is_open(now.time())
        )


def leave_order(folder: str) -> None:
    """Have the agent whose state lies in ``folder`` resync now, or at its next start."""
    write_whole(os.path.join(folder, ORDER_FILE), b"")


def is_ordered(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, ORDER_FILE))


def clear_order(folder: str) -> None:
    """The order is taken up, durably; if this is lost in a crash it is carried out once more."""
    path = os.path.join(folder, ORDER_FILE)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            sync_folder(folder)
    except OSError as error:
        raise storage_error("delete", path, error) from error


def check_leave(text: str) -> str:
    """``text`` as it is; ValueError when it says nothing that ``Leave`` knows."""
    Leave.parse(text)
    return text
