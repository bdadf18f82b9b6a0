"""What the config server is told, from what is the case."""

import dataclasses
import uuid
from pathlib import Path

from agents.mobility.final_order import FinalTold
from agents.mobility.host import HostFacts
from agents.mobility.reporting import Situation, machine_report
from agents.mobility.status import AgentStatus
from daemon.service import Health
from daemon.troubles import TEXT_CHARS_MAX, clipped
from replication.control.report import (
    TROUBLES_MAX,
    BlockDevice,
    Load,
    MachineReport,
    Phase,
    ResyncCause,
)
from tests.agents.mobility.test_status import status_in

HOST = HostFacts(uuid.UUID(int=9), "db", "Debian", "6.1")


def situation(status: AgentStatus | None = None, failure: str = "") -> Situation:
    return Situation(
        now_ns=7,
        started_ns=3,
        software="1.2",
        assignment=4,
        host=HOST,
        devices=(BlockDevice(id="a", device="/dev/a", size_bytes=1),),
        load=Load(cpu_share=0.5),
        status=status,
        failure=failure,
    )


def test_machine_that_is_not_protected_is_idle() -> None:
    report = machine_report(situation(), Health())
    assert (report.phase, report.generation, report.assignment) == (Phase.IDLE, 0, 4)
    assert (report.bios_uuid, report.hostname, report.time_ns) == (uuid.UUID(int=9), "db", 7)


def test_every_part_of_the_status_gets_into_the_report(tmp_path: Path) -> None:
    status = status_in(tmp_path)
    status.enter(Phase.RESYNC_REQUIRED, cause=ResyncCause.INTEGRITY, reason="x" * 5000)
    numbers = {
        "generation": 1, "durable_ns": 2, "restorable_ns": 3, "skew_ns": -4, "todo_bytes": 5,
        "done_bytes": 6, "total_bytes": 7, "changed_bytes": 8, "sent_bytes": 9,
        "app_consistent_ns": 10, "resync_request": 11,
    }  # fmt: skip
    for name, value in numbers.items():
        setattr(status, name, value)
    status.number, status.consistency = 12, "crash"
    report = machine_report(situation(status), Health())
    assert {name: getattr(report, name) for name in numbers} == numbers
    assert (report.committed, report.consistency) == (12, "crash")
    assert (report.phase, report.cause) == (Phase.RESYNC_REQUIRED, ResyncCause.INTEGRITY)
    assert len(report.reason) == TEXT_CHARS_MAX
    assert MachineReport.model_validate_json(report.model_dump_json()) == report


def test_failure_counts_for_more_than_what_the_last_run_said(tmp_path: Path) -> None:
    status = status_in(tmp_path)
    status.enter(Phase.REPLICATING)
    status.generation = 3
    report = machine_report(situation(status, "the disk is gone"), Health())
    assert (report.phase, report.reason) == (Phase.FAILED, "the disk is gone")
    assert report.generation == 3


def test_troubles_are_bounded_and_the_critical_come_first() -> None:
    health = Health()
    for number in range(TROUBLES_MAX + 5):
        health.report(f"part {number:03}", warning="w")
    health.report("disk", critical="c" * 5000)
    told = machine_report(situation(), health).troubles
    assert len(told) == TROUBLES_MAX
    assert (told[0].part, told[0].severity) == ("disk", "critical")
    assert told[0].reason == clipped("c" * 5000)


def test_final_changeset_is_told() -> None:
    now = dataclasses.replace(situation(), final=FinalTold(3, 2, 9))
    report = machine_report(now, Health())
    assert (report.final, report.final_generation, report.final_number) == (3, 2, 9)
    now = dataclasses.replace(situation(), final=FinalTold(reason="x" * 9999))
    report = machine_report(now, Health())
    assert (report.final, len(report.final_reason)) == (0, TEXT_CHARS_MAX)
