"""Components at every edge."""

import uuid
from typing import Any

import pytest

from appliance.config_server.watching.component_health import (
    REFUSED,
    UNREACHABLE,
    NodeFacts,
    VCenterFacts,
    node_health,
    vcenter_health,
)
from appliance.config_server.watching.reason import Code, Severity, State
from appliance.config_server.watching.rpo import NS
from replication.control.report import (
    ApplierReport,
    Load,
    ProcessServerReport,
    StoreReport,
    StreamReport,
    Trouble,
)
from replication.control.role import NodeRole

NOW = 1_800_000_000 * NS
NODE = uuid.UUID(int=5)
GIB = 1 << 30
DAY = 86400


def ago(seconds: float) -> int:
    return NOW - int(seconds * NS)


def process_server(**changes: Any) -> ProcessServerReport:
    fields: dict[str, Any] = {
        "time_ns": ago(1),
        "spool_max_bytes": 1000,
        "free_bytes": 10_000,
        "load": Load(cpu_share=0.5, memory_bytes=1000, memory_used_bytes=500),
    }
    return ProcessServerReport(**(fields | changes))


def applier(**changes: Any) -> ApplierReport:
    fields: dict[str, Any] = {"time_ns": ago(1), "free_bytes": 1000 * GIB}
    return ApplierReport(**(fields | changes))


def severity(
    code: Code, report: ProcessServerReport | ApplierReport | None, **changes: Any
) -> Severity | None:
    fields: dict[str, Any] = {"received_ns": ago(1), "certificate_ns": ago(-60 * DAY)}
    facts = NodeFacts(NODE, NodeRole.APPLIER, "n", ago(DAY), report, **(fields | changes))
    found = {reason.code: reason for reason in node_health(facts, NOW).reasons}
    assert set(found) <= {code}
    return found[code].severity if found else None


SHARES = [
    (800, None),
    (801, Severity.WARNING),
    (950, Severity.WARNING),
    (951, Severity.CRITICAL),
]


@pytest.mark.parametrize(("thousandths", "expected"), SHARES)
def test_cpu(thousandths: int, expected: Severity | None) -> None:
    load = Load(cpu_share=thousandths / 1000)
    assert severity(Code.CPU_HIGH, process_server(load=load)) is expected
    assert severity(Code.CPU_HIGH, applier(load=load)) is expected


@pytest.mark.parametrize(("thousandths", "expected"), SHARES)
def test_memory(thousandths: int, expected: Severity | None) -> None:
    load = Load(memory_bytes=1000, memory_used_bytes=thousandths)
    assert severity(Code.MEMORY_HIGH, process_server(load=load)) is expected
    assert severity(Code.MEMORY_HIGH, applier(load=load)) is expected


def test_load_that_cannot_be_told_is_no_trouble() -> None:
    assert severity(Code.CPU_HIGH, process_server(load=Load())) is None


@pytest.mark.parametrize(
    ("free", "expected"),
    [(300, None), (299, Severity.WARNING), (250, Severity.WARNING), (249, Severity.CRITICAL)],
)
def test_free_spool(free: int, expected: Severity | None) -> None:
    """By its own bound, and by the disk's room where that is less."""
    full = process_server(spool_bytes=1000 - free)
    assert severity(Code.SPOOL_LOW, full) is expected
    assert severity(Code.SPOOL_LOW, process_server(free_bytes=free)) is expected
    assert severity(Code.SPOOL_LOW, process_server(spool_bytes=2000)) is Severity.CRITICAL


def test_spool_without_a_bound_has_no_share() -> None:
    assert severity(Code.SPOOL_LOW, process_server(spool_max_bytes=0)) is None


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1800, None),
        (1800.1, Severity.WARNING),
        (2700, Severity.WARNING),
        (2700.1, Severity.CRITICAL),
    ],
)
def test_backlog_of_the_worst_stream(seconds: float, expected: Severity | None) -> None:
    streams = tuple(
        StreamReport(machine=uuid.UUID(int=index), backlog_seconds=behind)
        for index, behind in enumerate((1.0, seconds, 5.0))
    )
    assert severity(Code.BACKLOG_LONG, process_server(streams=streams)) is expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (45, None),
        (45.1, Severity.WARNING),
        (900, Severity.WARNING),
        (900.1, Severity.CRITICAL),
    ],
)
def test_heartbeat(seconds: float, expected: Severity | None) -> None:
    heard = process_server(time_ns=ago(seconds))
    assert severity(Code.NODE_SILENT, heard, received_ns=ago(seconds)) is expected
    never = NodeFacts(NODE, NodeRole.APPLIER, "n", ago(seconds))
    state = node_health(never, NOW).state
    assert state == (expected.value if expected else State.NORMAL)


@pytest.mark.parametrize(
    ("free", "used", "expected"),
    [
        (200 * GIB, 800 * GIB, None),
        (199 * GIB, 801 * GIB, Severity.WARNING),
        (100 * GIB, 900 * GIB, Severity.WARNING),
        (99 * GIB, 901 * GIB, Severity.CRITICAL),
        (4 * GIB, 1 * GIB, None),
        (4 * GIB - 1, 1 * GIB, Severity.WARNING),
        (1 * GIB, 1 * GIB, Severity.WARNING),
        (1 * GIB - 1, 1 * GIB, Severity.CRITICAL),
        (0, 0, None),
    ],
)
def test_free_space_below_the_store(free: int, used: int, expected: Severity | None) -> None:
    stores = (
        StoreReport(machine=NODE, space_bytes=used // 2),
        StoreReport(machine=NODE, space_bytes=used - used // 2),
    )
    assert severity(Code.STORE_SPACE_LOW, applier(free_bytes=free, stores=stores)) is expected


@pytest.mark.parametrize(
    ("days", "expected"),
    [(14, None), (13.9, Severity.WARNING), (3, Severity.WARNING), (2.9, Severity.CRITICAL)],
)
def test_certificate(days: float, expected: Severity | None) -> None:
    found = severity(Code.CERTIFICATE_ENDS, applier(), certificate_ns=ago(-days * DAY))
    assert found is expected


def test_clock() -> None:
    assert severity(Code.CLOCK_SKEW, applier(time_ns=ago(11))) is None
    assert severity(Code.CLOCK_SKEW, applier(time_ns=ago(12))) is Severity.WARNING
    assert severity(Code.CLOCK_SKEW, applier(time_ns=ago(302))) is Severity.CRITICAL


def test_troubles() -> None:
    troubles = (Trouble(part="cache", severity="critical", reason="refused"),)
    assert severity(Code.NODE_TROUBLE, process_server(troubles=troubles)) is Severity.CRITICAL


def test_vcenter() -> None:
    def seen(state: str) -> list[tuple[Code, Severity]]:
        facts = VCenterFacts(NODE, "vc", state, "no route", ago(600))
        return [(one.code, one.severity) for one in vcenter_health(facts, NOW).reasons]

    assert seen("connected") == []
    assert seen(UNREACHABLE) == [(Code.VCENTER_UNREACHABLE, Severity.WARNING)]
    assert seen(REFUSED) == [(Code.VCENTER_REFUSES, Severity.CRITICAL)]
