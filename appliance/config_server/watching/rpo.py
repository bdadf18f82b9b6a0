"""The two recovery point objectives, by the clock of the source.

A bookmark bears the source's time. What the source's clock says *now* is what its newest report
said, plus what has passed here since that came: the clock of the config server is only used to
measure how long ago that was, so that neither its being wrong nor a skew between the two counts.
What is left as an error is the time that the report was under way.

Source: docs/CONTROL.md §10.
"""

from dataclasses import dataclass

NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Sighting:
    """What the source's clock said when our own said ``received_ns``."""

    source_ns: int
    received_ns: int

    @property
    def skew_ns(self) -> int:
        """The source's clock less ours."""
        return self.source_ns - self.received_ns

    def source_now_ns(self, now_ns: int) -> int:
        """By the source's clock. Never before what the source itself has said: a clock of ours
        that was set back does not make it younger.
        """
        return self.source_ns + max(0, now_ns - self.received_ns)


@dataclass(frozen=True, slots=True)
class Rpo:
    """Seconds that would be lost now; None while there is nothing to count from.

    durable:    if the source were lost: since the newest bookmark in the cache storage account.
    restorable: if a machine were started at once: since the newest applied point.
    """

    durable_seconds: float | None
    restorable_seconds: float | None


NO_RPO = Rpo(None, None)


def rpo_seconds(bookmark_ns: int, sighting: Sighting, now_ns: int) -> float | None:
    """Never negative: a bookmark from before the source's clock was set back counts as now."""
    if bookmark_ns <= 0:
        return None
    return max(0, sighting.source_now_ns(now_ns) - bookmark_ns) / NS
