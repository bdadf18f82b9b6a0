"""When a resync that the agent finds necessary may begin, where no config server says so.

``at once``, or ``window 22:00-06:00`` in the machine's own time; a window may pass midnight.
"""

import datetime as dt
import re
from dataclasses import dataclass

from replication.control.assignment import ResyncOrder

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

    def order(self, now: dt.datetime) -> ResyncOrder:
        """What a config server would say at ``now``."""
        return ResyncOrder(allowed=self.is_open(now.time()))


def check_leave(text: str) -> str:
    """``text`` as it is; ValueError when it says nothing that ``Leave`` knows."""
    Leave.parse(text)
    return text
