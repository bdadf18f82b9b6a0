"""Which blobs the process server is asked to put again, and for how long: pure.

They are asked for at once and again after waits that double. What was asked for in vain for
``gap_seconds_max`` will not come: the stream is lost, until something does come after all.
"""

from collections.abc import Sequence

from replication.watermark import WANTED_COUNT_MAX

REASK_SECONDS_MAX = 300.0


class Asking:
    """The open questions of one machine; times are seconds of one monotonic clock."""

    def __init__(self, reask_seconds: float, gap_seconds_max: float) -> None:
        self._reask_seconds = reask_seconds
        self._gap_seconds_max = gap_seconds_max
        self.names: tuple[str, ...] = ()
        self._since: float | None = None
        self._wait = reask_seconds
        self._again = 0.0

    def ask(self, names: Sequence[str], now: float) -> None:
        """``names`` are what is wanted now, whatever was wanted before."""
        assert names
        if self._since is None:
            self._since = now
            self._wait = self._reask_seconds
            self._again = now + self._wait
        self.names = tuple(names[:WANTED_COUNT_MAX])

    def settle(self) -> None:
        """The stream goes on: nothing is wanted."""
        self.names = ()
        self._since = None

    def is_due(self, now: float) -> bool:
        """Whether to ask again now; starts the next wait if so."""
        if self._since is None or now < self._again:
            return False
        self._wait = min(2 * self._wait, REASK_SECONDS_MAX)
        self._again = now + self._wait
        return True

    def seconds(self, now: float) -> float:
        """How long it has been asked for; 0 when nothing is."""
        return 0.0 if self._since is None else now - self._since

    def is_in_vain(self, now: float) -> bool:
        return self.seconds(now) > self._gap_seconds_max
