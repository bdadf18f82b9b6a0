"""What is not well with a machine's failovers: pure.

Source: docs/CONTROL.md §10; docs/RECOVERY.md §4.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from appliance.config_server.watching.reason import Code, Reason, Severity, duration, reason
from appliance.config_server.watching.rpo import NS
from appliance.config_server.watching.thresholds import Thresholds


@dataclass(frozen=True, slots=True)
class FailoverFacts:
    """failed:   why its newest failover came to nothing; empty when it did not. is_test: of that.
    test_since_ns: since when a test's VM is there, the oldest; 0: there is none.
    uncommitted_since_ns: since when it is failed over and nothing is decided; 0: it is not.
    """

    failed: str = ""
    is_test: bool = False
    test_since_ns: int = 0
    uncommitted_since_ns: int = 0


NO_FAILOVERS = FailoverFacts()


def failover_reasons(facts: FailoverFacts, now_ns: int, thresholds: Thresholds) -> Iterator[Reason]:
    """A failed failover, a test that nobody cleans up, a failover that nobody decides on."""
    if facts.failed:
        kind = "test failover" if facts.is_test else "failover"
        severity = Severity.WARNING if facts.is_test else Severity.CRITICAL
        yield reason(Code.FAILOVER_FAILED, severity, f"its newest {kind} failed: {facts.failed}")
    if facts.test_since_ns:
        seconds = (now_ns - facts.test_since_ns) / NS
        found = thresholds.test_open_seconds.above(seconds)
        if found is not None:
            told = f"a test failover has not been cleaned up for {duration(seconds)}"
            yield reason(Code.TEST_NOT_CLEANED, found, told)
    if facts.uncommitted_since_ns:
        seconds = (now_ns - facts.uncommitted_since_ns) / NS
        found = thresholds.uncommitted_seconds.above(seconds)
        if found is not None:
            told = f"it is failed over, neither committed nor taken back, for {duration(seconds)}"
            yield reason(Code.NOT_COMMITTED, found, told)
