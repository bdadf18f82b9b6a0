"""The window in which a resync may begin by itself: ``HH:MM-HH:MM`` in UTC, or ``always``.

Source: docs/CONTROL.md §8, §11.
"""

import re
from dataclasses import dataclass
from typing import Self

from replication.errors import ConfigError

ALWAYS = "always"
DAY_MINUTES = 24 * 60
_MINUTE_NS = 60 * 10**9
_FORM = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, slots=True)
class Window:
    """Minutes of the day in UTC, from ``start`` up to and without ``end``; over midnight where end
    is the smaller. Both 0: always.
    """

    start: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ConfigError that says what the text should be."""
        if text == ALWAYS:
            return cls(0, 0)
        found = _FORM.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"the resync window {text!r} is not HH:MM-HH:MM in UTC, nor {ALWAYS}",
                hint='as "22:00-06:00"',
            )
        hours = [int(part) for part in found.groups()]
        start, end = hours[0] * 60 + hours[1], hours[2] * 60 + hours[3]
        if start == end:
            raise ConfigError(
                f"the resync window {text!r} ends when it begins", hint=f"say {ALWAYS} for all day"
            )
        return cls(start, end)

    def is_open(self, now_ns: int) -> bool:
        if self.start == self.end:
            return True
        minute = now_ns // _MINUTE_NS % DAY_MINUTES
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    def opens_ns(self, now_ns: int) -> int:
        """When it is open next; now when it is."""
        if self.is_open(now_ns):
            return now_ns
        minute = now_ns // _MINUTE_NS
        return (minute + (self.start - minute) % DAY_MINUTES) * _MINUTE_NS


def resync_allowed(window: str, now_ns: int) -> bool:
    """Whether a resync that an agent finds necessary may begin now."""
    return Window.parse(window).is_open(now_ns)
