"""When a reason becomes an event, and when the event ends.

A reason must hold for ``settle_seconds`` before it opens (or worsens) an event, and be away (or
milder) for ``clear_seconds`` before that is cleared: a value that flaps about its limit makes one
event and not hundreds.
"""

from dataclasses import dataclass

from appliance.config_server.watching.reason import Severity
from appliance.config_server.watching.rpo import NS


@dataclass(frozen=True, slots=True)
class Settling:
    """How long a change must last before it counts."""

    settle_seconds: float = 20.0
    clear_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Mark:
    """What is open for one code of one source, and since when the truth is otherwise.

    side:     1: worse than what is open, -1: milder or gone, 0: as it is.
    since_ns: since when it is on that side.
    """

    open: Severity | None = None
    side: int = 0
    since_ns: int = 0

    @property
    def is_idle(self) -> bool:
        """Nothing is open and nothing is about to be."""
        return self.open is None and self.side == 0


def follow(mark: Mark, seen: Severity | None, now_ns: int, settling: Settling) -> Mark:
    """The next mark. Where ``open`` differs from before, an event is to be cleared or opened."""
    side = _sign(_rank(seen) - _rank(mark.open))
    if side == 0:
        return Mark(mark.open)
    since_ns = min(mark.since_ns, now_ns) if side == mark.side else now_ns
    wait_seconds = settling.settle_seconds if side > 0 else settling.clear_seconds
    if now_ns - since_ns >= wait_seconds * NS:
        return Mark(seen)
    return Mark(mark.open, side, since_ns)


def _rank(severity: Severity | None) -> int:
    return severity.rank if severity else 0


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)
