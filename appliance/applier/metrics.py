"""What an applier counts, by machine name."""

import contextlib

from prometheus_client import CollectorRegistry, Counter, Gauge

from replication.bookmark import Stamp
from replication.manifest import Manifest

_BY_MACHINE = ("machine",)


class ApplierMetrics:
    """Counters and gauges in a daemon's registry; every one has the label ``machine``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._all: list[Counter | Gauge] = []

        def counter(name: str, what: str) -> Counter:
            made = Counter(f"understudy_applier_{name}", what, _BY_MACHINE, registry=registry)
            self._all.append(made)
            return made

        def gauge(name: str, what: str) -> Gauge:
            made = Gauge(f"understudy_applier_{name}", what, _BY_MACHINE, registry=registry)
            self._all.append(made)
            return made

        self.changesets = counter("changesets", "Changesets applied")
        self.sent_bytes = counter("sent_bytes", "Bytes of the segments applied, as they travelled")
        self.changed_bytes = counter("changed_bytes", "Bytes of the blocks applied")
        self.integrity_events = counter("integrity_events", "Bytes found that were not as sealed")
        self.lag_changesets = gauge("lag_changesets", "Changesets seen that are not applied")
        self.restorable_time_seconds = gauge(
            "restorable_time_seconds", "Time of the newest recovery point, seconds since 1970 UTC"
        )
        self.wanted_blobs = gauge("wanted_blobs", "Blobs asked for because they are missing or bad")
        self.repair_runs = gauge("repair_runs", "Runs of blocks that the source must send again")
        self.lease_held = gauge("lease_held", "1 while this applier owns the machine")
        self.scrubbed_bytes = counter("scrubbed_bytes", "Bytes re-read against their digests")

    def count_applied(self, name: str, manifest: Manifest) -> None:
        self.changesets.labels(name).inc()
        self.sent_bytes.labels(name).inc(manifest.sent_bytes)
        self.changed_bytes.labels(name).inc(manifest.changed_bytes)

    def tell_waiting(self, name: str, *, wanted: int, newest: Stamp, head: Stamp) -> None:
        """How many blobs are asked for, and how far what is applied is behind what is there."""
        self.wanted_blobs.labels(name).set(wanted)
        behind = newest.number - (head.number if newest.generation == head.generation else 0)
        self.lag_changesets.labels(name).set(behind if newest > head else 0)

    def forget(self, name: str) -> None:
        """Tell nothing more of a machine that is called otherwise now, or is gone."""
        for metric in self._all:
            with contextlib.suppress(KeyError):
                metric.remove(name)
