"""How often a workload acts, and until when."""

import signal
import threading
import time

BURST_SECONDS_MAX = 0.25


class Pace:
    """Lets ``rate`` actions a second happen, until SIGTERM or SIGINT.

    After a stall (a frozen file system) at most BURST_SECONDS_MAX of actions are caught up.
    """

    def __init__(self, rate: float) -> None:
        self._interval_seconds = 1.0 / rate
        self._due = time.monotonic()
        self._stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())

    def next(self) -> bool:
        """Wait for the next action's time; False when the workload shall end."""
        now = time.monotonic()
        self._due = max(self._due + self._interval_seconds, now - BURST_SECONDS_MAX)
        if self._due <= now:
            return not self._stop.is_set()
        return not self._stop.wait(self._due - now)
