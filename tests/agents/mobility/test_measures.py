"""What Prometheus is told."""

from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from agents.mobility.measures import AgentMeasures
from replication.control.report import Phase
from tests.agents.mobility.test_status import status_in

NOW_NS = 100_000_000_000


def lines(registry: CollectorRegistry) -> set[str]:
    return {
        line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")
    }


def test_agent_that_replicates_nothing_is_idle() -> None:
    registry = CollectorRegistry()
    AgentMeasures(registry)
    told = lines(registry)
    assert 'understudy_agent_phase{phase="idle"} 1.0' in told
    assert len(told) == len(Phase)


def test_news_are_told_in_their_units(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    measures = AgentMeasures(registry, clock_ns=lambda: NOW_NS)
    measures.status = status = status_in(tmp_path)
    status.enter(Phase.INITIAL)
    status.durable_ns = NOW_NS - 2_500_000_000
    status.todo_bytes, status.sent_bytes, status.pauses = 4096, 77, 3
    status.pause_seconds = 0.25
    assert {
        'understudy_agent_phase{phase="initial replication"} 1.0',
        'understudy_agent_phase{phase="idle"} 0.0',
        "understudy_agent_rpo_durable_seconds 2.5",
        "understudy_agent_todo_bytes 4096.0",
        "understudy_agent_sent_bytes_total 77.0",
        "understudy_agent_freezes_total 3.0",
        "understudy_agent_frozen_seconds_total 0.25",
    } <= lines(registry)
    assert not [line for line in lines(registry) if "rpo_restorable" in line]
