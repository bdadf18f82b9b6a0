"""What the agent says of itself and its machine to the config server. Pure.

Source: docs/CONTROL.md §5.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agents.mobility.final_order import NOTHING_TOLD, FinalTold
from agents.mobility.host import HostFacts
from agents.mobility.status import AgentStatus
from daemon.service import Health
from daemon.troubles import clipped
from replication.control.report import (
    TROUBLES_MAX,
    BlockDevice,
    Load,
    MachineReport,
    Phase,
    Trouble,
)


@dataclass(frozen=True, slots=True)
class Situation:
    """What is the case when a report is made.

    status:  of the run under way, or of the last one; None while nothing was replicated.
    failure: why nothing is replicated although it should be; empty while all is well.
    final:   what came of the order for a final changeset.
    """

    now_ns: int
    started_ns: int
    software: str
    assignment: int
    host: HostFacts
    devices: tuple[BlockDevice, ...]
    load: Load
    status: AgentStatus | None = None
    failure: str = ""
    final: FinalTold = NOTHING_TOLD


def machine_report(situation: Situation, health: Health) -> MachineReport:
    """The whole report of now."""
    host, status = situation.host, situation.status
    report = MachineReport(
        software=situation.software,
        time_ns=situation.now_ns,
        started_ns=situation.started_ns,
        assignment=situation.assignment,
        load=situation.load,
        troubles=tuple(troubles(health))[:TROUBLES_MAX],
        bios_uuid=host.bios_uuid,
        hostname=clipped(host.hostname),
        system=clipped(host.system),
        kernel=clipped(host.kernel),
        devices=situation.devices,
        final=situation.final.number,
        final_generation=situation.final.generation,
        final_number=situation.final.changeset,
        final_reason=clipped(situation.final.reason),
    )
    if status is not None:
        report = report.model_copy(
            update={
                "phase": status.phase,
                "cause": status.cause,
                "reason": clipped(status.reason),
                "generation": status.generation,
                "committed": status.number,
                "durable_ns": status.durable_ns,
                "restorable_ns": status.restorable_ns,
                "skew_ns": status.skew_ns,
                "todo_bytes": status.todo_bytes,
                "done_bytes": status.done_bytes,
                "total_bytes": status.total_bytes,
                "changed_bytes": status.changed_bytes,
                "sent_bytes": status.sent_bytes,
                "consistency": status.consistency,
                "app_consistent_ns": status.app_consistent_ns,
                "resync_request": status.resync_request,
            }
        )
    if situation.failure:
        report = report.model_copy(
            update={"phase": Phase.FAILED, "cause": None, "reason": clipped(situation.failure)}
        )
    return report


def troubles(health: Health) -> Iterable[Trouble]:
    """What is not well, the critical first."""
    told: tuple[tuple[Mapping[str, str], str], ...] = (
        (health.criticals, "critical"),
        (health.warnings, "warning"),
    )
    for reasons, severity in told:
        for part, reason in sorted(reasons.items()):
            yield Trouble.model_validate(
                {"part": clipped(part), "severity": severity, "reason": clipped(reason)}
            )
