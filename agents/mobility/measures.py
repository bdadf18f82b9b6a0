"""What the agent measures, as Prometheus tells it: read from its status when it is asked for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from replication.control.report import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from agents.mobility.status import AgentStatus

_PREFIX = "understudy_agent"


class AgentMeasures(Collector):
    """All metrics; each in the unit that its name ends with. Register once in a process.

    status: the news of the run under way; None while nothing is replicated.
    """

    def __init__(
        self, registry: CollectorRegistry, *, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self.status: AgentStatus | None = None
        self._clock_ns = clock_ns
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        status = self.status
        now = status.phase if status else Phase.IDLE
        phases = GaugeMetricFamily(f"{_PREFIX}_phase", "1 for the one it is in.", labels=["phase"])
        for phase in Phase:
            phases.add_metric([phase.value], float(phase is now))
        yield phases
        if status is None:
            return
        for name, told, bookmark_ns in (
            ("durable", "the newest bookmark in the cache", status.durable_ns),
            ("restorable", "the newest recovery point", status.restorable_ns),
        ):
            if bookmark_ns:
                age = max(0, self._clock_ns() - bookmark_ns) / 1e9
                yield GaugeMetricFamily(f"{_PREFIX}_rpo_{name}_seconds", f"Age of {told}.", age)
        for name, told, value in (
            ("todo_bytes", "What has changed and was not sent yet.", status.todo_bytes),
            ("done_bytes", "Of initial replication or resync.", status.done_bytes),
            ("total_bytes", "The whole of it; 0 when there is none.", status.total_bytes),
            ("unapplied_changesets", "Kept until they are applied.", status.unapplied_count),
        ):
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", told, value)
        counted: tuple[tuple[str, str, float], ...] = (
            ("changed_bytes", "Data and zeros in changesets.", status.changed_bytes),
            ("sent_bytes", "Their segments, as they travel.", status.sent_bytes),
            ("freezes", "Times that file systems were frozen.", status.pauses),
            ("frozen_seconds", "How long they were.", status.pause_seconds),
        )
        for name, told, total in counted:
            yield CounterMetricFamily(f"{_PREFIX}_{name}", told, total)
