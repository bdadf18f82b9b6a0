"""The health of what all runs on: process servers, appliers, compute nodes, vCenters. Pure.

Source: docs/CONTROL.md §10.
"""

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from appliance.config_server.watching.node_health import (
    certificate_reason,
    silence_reason,
    skew_reason,
    trouble_reason,
)
from appliance.config_server.watching.reason import (
    Code,
    Health,
    Reason,
    Severity,
    duration,
    health_of,
    reason,
)
from appliance.config_server.watching.rpo import NS, Sighting
from appliance.config_server.watching.thresholds import THRESHOLDS, Thresholds
from replication.control.report import (
    REPORT_SECONDS_DEFAULT,
    AnyReport,
    ApplierReport,
    ComputeReport,
    Load,
    ProcessServerReport,
)
from replication.control.role import NodeRole

_GIB = 1 << 30
_KINDS: Mapping[NodeRole, Literal["process-server", "applier", "compute"]] = {
    NodeRole.PROCESS_SERVER: "process-server",
    NodeRole.APPLIER: "applier",
    NodeRole.COMPUTE: "compute",
}
UNREACHABLE = "unreachable"
REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A process server, an applier or a compute node.

    expected_ns:    since when it should be heard of: its enrolment.
    certificate_ns: when its newest good certificate ends; 0: it has none.
    """

    id: uuid.UUID
    role: NodeRole
    name: str
    expected_ns: int
    report: AnyReport | None = None
    received_ns: int = 0
    certificate_ns: int = 0
    interval_seconds: float = REPORT_SECONDS_DEFAULT

    @property
    def kind(self) -> Literal["process-server", "applier", "compute"]:
        return _KINDS[self.role]


@dataclass(frozen=True, slots=True)
class VCenterFacts:
    """A vCenter: its row's state and reason, and when it last answered."""

    id: uuid.UUID
    name: str
    state: str
    reason: str = ""
    seen_ns: int = 0


def node_health(facts: NodeFacts, now_ns: int, thresholds: Thresholds = THRESHOLDS) -> Health:
    """Of a process server, an applier or a compute node."""
    report = facts.report
    sighting = Sighting(report.time_ns, facts.received_ns) if report else None
    return health_of(
        [
            silence_reason(
                Code.NODE_SILENT,
                facts.received_ns,
                facts.expected_ns,
                now_ns,
                interval_seconds=facts.interval_seconds,
                thresholds=thresholds,
            ),
            certificate_reason(facts.certificate_ns, now_ns, thresholds),
            skew_reason(sighting, thresholds),
            trouble_reason(Code.NODE_TROUBLE, report.troubles if report else ()),
            *(_load(report.load, thresholds) if report else ()),
            *(
                _process_server(report, thresholds)
                if isinstance(report, ProcessServerReport)
                else ()
            ),
            *(
                _space(report, thresholds)
                if isinstance(report, ApplierReport | ComputeReport)
                else ()
            ),
        ]
    )


def vcenter_health(facts: VCenterFacts, now_ns: int) -> Health:
    """Of a vCenter, by what its reader says of it."""
    if facts.state == REFUSED:
        return health_of(
            [
                reason(
                    Code.VCENTER_REFUSES,
                    Severity.CRITICAL,
                    f"it refuses the credentials: {facts.reason or 'no reason given'}",
                )
            ]
        )
    if facts.state != UNREACHABLE:
        return health_of([])
    since = f" for {duration((now_ns - facts.seen_ns) / NS)}" if facts.seen_ns else ""
    return health_of(
        [
            reason(
                Code.VCENTER_UNREACHABLE,
                Severity.WARNING,
                f"it does not answer{since}: {facts.reason or 'no reason given'}",
            )
        ]
    )


def _load(load: Load, thresholds: Thresholds) -> Iterator[Reason]:
    if load.cpu_share is not None:
        severity = thresholds.cpu_share.above(load.cpu_share)
        if severity:
            told = f"its host's CPU use is {_percent(load.cpu_share)}"
            yield reason(Code.CPU_HIGH, severity, told)
    if load.memory_bytes:
        share = load.memory_used_bytes / load.memory_bytes
        severity = thresholds.memory_share.above(share)
        if severity:
            yield reason(Code.MEMORY_HIGH, severity, f"its host's memory use is {_percent(share)}")


def spool_free_share(report: ProcessServerReport) -> float | None:
    """What the spool may still take, of all it may: its own bound or its disk, whichever is less.

    None where it has no bound.
    """
    if report.spool_max_bytes <= 0:
        return None
    free_bytes = max(0, min(report.spool_max_bytes - report.spool_bytes, report.free_bytes))
    return free_bytes / report.spool_max_bytes


def store_free_share(report: ApplierReport | ComputeReport) -> float | None:
    """Free, of what is free and what points or VMs' disks fill. None where nothing is known."""
    filling = report.stores if isinstance(report, ApplierReport) else report.vms
    used_bytes = sum(each.space_bytes for each in filling)
    total_bytes = report.free_bytes + used_bytes
    return report.free_bytes / total_bytes if total_bytes else None


def backlog_seconds(report: ProcessServerReport) -> float:
    """The longest of its streams'."""
    return max((stream.backlog_seconds for stream in report.streams), default=0.0)


def _process_server(report: ProcessServerReport, thresholds: Thresholds) -> Iterator[Reason]:
    share = spool_free_share(report)
    if share is not None:
        severity = thresholds.spool_free_share.below(share)
        if severity:
            yield reason(Code.SPOOL_LOW, severity, f"{_percent(share)} of the spool is free")
    seconds = backlog_seconds(report)
    severity = thresholds.backlog_seconds.above(seconds)
    if severity:
        yield reason(
            Code.BACKLOG_LONG,
            severity,
            f"changesets have waited {duration(seconds)} for the cache storage account",
        )


def _space(report: ApplierReport | ComputeReport, thresholds: Thresholds) -> Iterator[Reason]:
    share = store_free_share(report)
    if share is None:
        return
    severities = [
        found
        for found in (
            thresholds.store_free_share.below(share),
            thresholds.store_free_bytes.below(report.free_bytes),
        )
        if found
    ]
    if severities:
        yield reason(
            Code.STORE_SPACE_LOW,
            max(severities, key=lambda severity: severity.rank),
            f"{report.free_bytes / _GIB:,.1f} GiB ({_percent(share)}) are free on its disk",
        )


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"
