"""What the config server measures, for Prometheus.

Gauges are made of the newest assessment whenever somebody reads them: what is gone leaves none
behind.
"""

from collections import Counter as Tally
from collections.abc import Iterable, Iterator
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from appliance.config_server.protection.jobs import JobState
from appliance.config_server.protection.table import State as Protection
from appliance.config_server.watching.alerts import AlertMailer
from appliance.config_server.watching.health import machine_rpo
from appliance.config_server.watching.reason import State
from appliance.config_server.watching.watcher import Watcher

PREFIX = "understudy_config_server"
LATENCY_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 30.0, 70.0)


class RequestMeasures:
    """Requests by route (its pattern, so that names make no series), method and status."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.count = Counter(
            f"{PREFIX}_requests",
            "Requests that were answered.",
            ("method", "route", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            f"{PREFIX}_request_seconds",
            "How long answers took; long polls wait.",
            ("method", "route"),
            buckets=LATENCY_SECONDS,
            registry=registry,
        )

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self.count.labels(method, route, str(status)).inc()
        self.seconds.labels(method, route).observe(seconds)


class WatchCollector(Collector):
    """Machines, nodes, jobs and events as the watcher last saw them."""

    def __init__(self, watcher: Watcher, mailer: AlertMailer) -> None:
        self._watcher = watcher
        self._mailer = mailer

    def collect(self) -> Iterable[Metric]:
        yield from self._machines()
        yield from self._components()
        yield from self._rest()

    def _machines(self) -> Iterator[Metric]:
        assessment = self._watcher.assessment
        machines = list(assessment.machines.values())
        yield _counts(
            "machines", "Machines by state.", Protection, [one.facts.state for one in machines]
        )
        yield _counts(
            "machine_health",
            "Machines by health.",
            State,
            [one.health.state for one in machines],
            label="health",
        )
        durable = _gauge("rpo_durable_seconds", "RPO durable.", "machine")
        restorable = _gauge("rpo_restorable_seconds", "RPO restorable.", "machine")
        now_ns = self._watcher.now_ns()
        for one in machines:
            rpo = machine_rpo(one.facts, now_ns)
            for family, seconds in (
                (durable, rpo.durable_seconds),
                (restorable, rpo.restorable_seconds),
            ):
                if seconds is not None:
                    family.add_metric([one.facts.name], seconds)
        yield durable
        yield restorable

    def _components(self) -> Iterator[Metric]:
        assessment = self._watcher.assessment
        family = _gauge("nodes", "Process servers and appliers by health.", "role", "health")
        tally = Tally((node.facts.role, node.health.state) for node in assessment.nodes.values())
        for role in sorted({role for role, _ in tally}):
            for state in State:
                family.add_metric([role, state], tally[role, state])
        yield family
        yield _counts(
            "vcenters",
            "vCenters by health.",
            State,
            [one.health.state for one in assessment.vcenters.values()],
            label="health",
        )

    def _rest(self) -> Iterator[Metric]:
        watcher = self._watcher
        jobs = _gauge("jobs", "Jobs by state.", "state")
        for state in JobState:
            jobs.add_metric([state], watcher.assessment.job_counts.get(state, 0))
        yield jobs
        opened = watcher.open_counts
        watching = _gauge("watching", "1 where this config server writes the events.")
        watching.add_metric([], float(opened is not None))
        yield watching
        events = _gauge("events_open", "Open events, told by the one that watches.", "severity")
        for severity, count in (opened or {}).items():
            events.add_metric([severity], count)
        yield events
        seconds = _gauge("look_seconds", "What the newest look at everything took.")
        seconds.add_metric([], watcher.look_seconds)
        yield seconds
        mails = CounterMetricFamily(
            f"{PREFIX}_alert_mails", "Alert e-mails that were tried.", labels=("outcome",)
        )
        mails.add_metric(["sent"], self._mailer.sent_count)
        mails.add_metric(["failed"], self._mailer.failed_count)
        yield mails


def _gauge(name: str, told: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}_{name}", told, labels=labels)


def _counts(
    name: str, told: str, kinds: type[StrEnum], found: list[StrEnum], *, label: str = "state"
) -> GaugeMetricFamily:
    """How many of each kind; none of a kind is 0, not absent."""
    family = _gauge(name, told, label)
    tally = Tally(found)
    for kind in kinds:
        family.add_metric([kind.value], tally[kind])
    return family
