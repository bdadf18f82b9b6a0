"""How often a source may ask, and how long it waits after it was wrong. Holds no clock's state but
what ``now`` (monotonic seconds) gives; sources are at most SOURCES_MAX, the longest idle go first.
"""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from replication.errors import LimitError

SOURCES_MAX = 8192
FREE_FAILURES = 3
"""Wrong tokens in a row that cost no wait: people mistype."""

WAIT_SECONDS_FIRST = 1.0
WAIT_SECONDS_MAX = 300.0
FORGET_SECONDS = 900.0
_IPV6_PREFIX = 64


def source_of(address: str) -> str:
    """What counts as one source: an IPv4 address, or the network that one IPv6 host owns."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))
    return address


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class Rates:
    """Token buckets: ``per_second`` in the long run, ``burst`` at once."""

    def __init__(
        self, per_second: float, burst: int, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_second
        self._burst = burst
        self._now = now
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, source: str) -> float:
        """0 when ``source`` may ask now, else the seconds until it may."""
        now = self._now()
        bucket = self._buckets.get(source)
        if bucket is None:
            bucket = self._buckets[source] = _Bucket(self._burst, now)
            if len(self._buckets) > SOURCES_MAX:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(source)
        gained = (now - bucket.filled_at) * self._per_second
        bucket.tokens = min(self._burst, bucket.tokens + gained)
        bucket.filled_at = now
        if bucket.tokens >= 1:
            bucket.tokens -= 1
            return 0.0
        return (1 - bucket.tokens) / self._per_second


@dataclass(slots=True)
class _Failures:
    count: int
    failed_at: float
    free_at: float


class Attempts:
    """Sources that were wrong: each further time doubles the wait. Being right resets nothing,
    else one valid token would pay for guessing others.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._sources: OrderedDict[str, _Failures] = OrderedDict()

    def check(self, address: str) -> None:
        """Raise LimitError while ``address`` has to wait."""
        failures = self._sources.get(source_of(address))
        wait = failures.free_at - self._now() if failures else 0.0
        if wait > 0:
            raise LimitError(
                "too many wrong tokens or proofs came from this address",
                hint="wait, then try again with the right one",
                retry_after_seconds=wait,
            )

    def failed(self, address: str) -> None:
        """Count a wrong token or proof."""
        source, now = source_of(address), self._now()
        failures = self._sources.get(source)
        if failures is None or now - failures.failed_at > FORGET_SECONDS:
            failures = self._sources[source] = _Failures(0, now, now)
            if len(self._sources) > SOURCES_MAX:
                self._sources.popitem(last=False)
        self._sources.move_to_end(source)
        failures.count += 1
        failures.failed_at = now
        doublings = failures.count - FREE_FAILURES - 1
        if doublings >= 0:
            # The exponent is bounded: two to the power of a long attack is no float.
            wait = WAIT_SECONDS_FIRST * 2.0 ** min(doublings, 16)
            failures.free_at = now + min(wait, WAIT_SECONDS_MAX)
