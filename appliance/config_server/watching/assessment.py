"""Everything's health at one moment. Pure: what was read, what is remembered, the clock.

Source: docs/CONTROL.md §10.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from appliance.config_server.watching.component_health import (
    NodeFacts,
    VCenterFacts,
    node_health,
    vcenter_health,
)
from appliance.config_server.watching.health import (
    MachineFacts,
    Part,
    machine_health,
    machine_rpo,
)
from appliance.config_server.watching.progress import (
    AppExpectation,
    Progress,
    follow_app_expectation,
    follow_progress,
)
from appliance.config_server.watching.reason import (
    Code,
    Health,
    Reason,
    Severity,
    health_of,
    reason,
)
from appliance.config_server.watching.rpo import NO_RPO, Rpo
from appliance.config_server.watching.thresholds import THRESHOLDS, Thresholds
from appliance.config_server.watching.work_health import WorkFacts, work_health
from replication.control.report import (
    ApplierReport,
    ProcessServerReport,
    StoreReport,
    StreamReport,
)

EventKey = tuple[uuid.UUID, Code]


@dataclass(frozen=True, slots=True)
class MachineRow:
    """What the database knows of a machine; who its components are."""

    facts: MachineFacts
    process_server_id: uuid.UUID | None = None
    applier_id: uuid.UUID | None = None


@dataclass(frozen=True, slots=True)
class Findings:
    """What was read. ``job_counts``: by state. ``work``: of drills and jobs."""

    machines: tuple[MachineRow, ...] = ()
    nodes: tuple[NodeFacts, ...] = ()
    vcenters: tuple[VCenterFacts, ...] = ()
    job_counts: Mapping[str, int] = field(default_factory=dict)
    work: tuple[WorkFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class AssessedMachine:
    facts: MachineFacts
    rpo: Rpo
    health: Health
    process_server_id: uuid.UUID | None = None
    applier_id: uuid.UUID | None = None


@dataclass(frozen=True, slots=True)
class AssessedNode:
    facts: NodeFacts
    health: Health


@dataclass(frozen=True, slots=True)
class AssessedVCenter:
    facts: VCenterFacts
    health: Health


@dataclass(frozen=True, slots=True)
class AssessedWork:
    facts: WorkFacts
    health: Health


@dataclass(frozen=True, slots=True)
class Assessment:
    """The health of all there is, at ``at_ns``.

    defects: what our own code raised for a machine or a component; its health says so, too.
    """

    at_ns: int = 0
    machines: Mapping[uuid.UUID, AssessedMachine] = field(default_factory=dict)
    nodes: Mapping[uuid.UUID, AssessedNode] = field(default_factory=dict)
    vcenters: Mapping[uuid.UUID, AssessedVCenter] = field(default_factory=dict)
    job_counts: Mapping[str, int] = field(default_factory=dict)
    defects: Mapping[uuid.UUID, Exception] = field(default_factory=dict)
    work: Mapping[uuid.UUID, AssessedWork] = field(default_factory=dict)

    def sources(self) -> dict[uuid.UUID, tuple[str, Health]]:
        """Names and health of all that can have events."""
        found: dict[uuid.UUID, tuple[str, Health]] = {}
        for machine in self.machines.values():
            found[machine.facts.id] = (machine.facts.name, machine.health)
        for node in self.nodes.values():
            found[node.facts.id] = (node.facts.name, node.health)
        for vcenter in self.vcenters.values():
            found[vcenter.facts.id] = (vcenter.facts.name, vcenter.health)
        for work in self.work.values():
            found[work.facts.id] = (work.facts.name, work.health)
        return found

    def reasons(self) -> dict[EventKey, tuple[str, Reason]]:
        """What deserves an event, with the source's name."""
        return {
            (source_id, reason.code): (name, reason)
            for source_id, (name, health) in self.sources().items()
            for reason in health.reasons
            if reason.opens_event
        }


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered between two assessments, by machine."""

    progress: Mapping[uuid.UUID, Progress] = field(default_factory=dict)
    app_expectations: Mapping[uuid.UUID, AppExpectation] = field(default_factory=dict)


def assess(
    findings: Findings, memory: Memory, now_ns: int, thresholds: Thresholds = THRESHOLDS
) -> tuple[Assessment, Memory]:
    """The health of everything, and what to remember for the next time.

    What one machine or component has that our code cannot cope with harms no other.
    """
    defects: dict[uuid.UUID, Exception] = {}
    nodes: dict[uuid.UUID, AssessedNode] = {}
    for node in findings.nodes:
        try:
            nodes[node.id] = AssessedNode(node, node_health(node, now_ns, thresholds))
        except Exception as error:  # noqa: BLE001 - told by its health, and by who looks
            defects[node.id] = error
            nodes[node.id] = AssessedNode(replace(node, report=None), _defect(error))
    streams, stores = _by_machine(tuple(one.facts for one in nodes.values()))
    progress: dict[uuid.UUID, Progress] = {}
    expectations: dict[uuid.UUID, AppExpectation] = {}
    machines: dict[uuid.UUID, AssessedMachine] = {}
    for row in findings.machines:
        machine = row.facts
        components = (row.process_server_id, row.applier_id)
        expectations[machine.id] = follow_app_expectation(
            memory.app_expectations.get(machine.id),
            machine.app_frequency_seconds,
            machine.since_ns,
            now_ns,
        )
        try:
            moved = follow_progress(memory.progress.get(machine.id), machine.report, now_ns)
            if moved is not None:
                progress[machine.id] = moved
            facts = replace(
                machine,
                stream=streams.get((row.process_server_id, machine.id)),
                store=stores.get((row.applier_id, machine.id)),
                process_server=_part(nodes, row.process_server_id),
                applier=_part(nodes, row.applier_id),
                progress=moved,
                app_expectation=expectations[machine.id],
            )
            rpo, health = machine_rpo(facts, now_ns), machine_health(facts, now_ns, thresholds)
        except Exception as error:  # noqa: BLE001 - told by its health, and by who looks
            defects[machine.id] = error
            # Whoever asks for its RPO later on shall not fail on what failed here.
            facts, rpo, health = replace(machine, report=None), NO_RPO, _defect(error)
        machines[machine.id] = AssessedMachine(facts, rpo, health, *components)
    vcenters = {
        facts.id: AssessedVCenter(facts, vcenter_health(facts, now_ns))
        for facts in findings.vcenters
    }
    work = {
        facts.id: AssessedWork(facts, work_health(facts, now_ns, thresholds))
        for facts in findings.work
    }
    job_counts = dict(findings.job_counts)
    assessment = Assessment(now_ns, machines, nodes, vcenters, job_counts, defects, work)
    return assessment, Memory(progress, expectations)


def _defect(error: Exception) -> Health:
    told = f"its health cannot be told: {type(error).__name__}: {error}"
    return health_of([reason(Code.DEFECT, Severity.CRITICAL, told)])


def _by_machine(
    nodes: tuple[NodeFacts, ...],
) -> tuple[
    dict[tuple[uuid.UUID | None, uuid.UUID], StreamReport],
    dict[tuple[uuid.UUID | None, uuid.UUID], StoreReport],
]:
    streams: dict[tuple[uuid.UUID | None, uuid.UUID], StreamReport] = {}
    stores: dict[tuple[uuid.UUID | None, uuid.UUID], StoreReport] = {}
    for node in nodes:
        if isinstance(node.report, ProcessServerReport):
            streams |= {(node.id, stream.machine): stream for stream in node.report.streams}
        elif isinstance(node.report, ApplierReport):
            stores |= {(node.id, store.machine): store for store in node.report.stores}
    return streams, stores


def _part(nodes: Mapping[uuid.UUID, AssessedNode], node_id: uuid.UUID | None) -> Part | None:
    node = nodes.get(node_id) if node_id else None
    return Part(node.facts.name, node.health.state) if node else None
