"""``health``: whether all is well, and what is not.

Source: docs/CONTROL.md §10.
"""

import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Annotated

from fastapi import Path
from pydantic import BaseModel

from appliance.config_server.api.access import needs
from appliance.config_server.api.documents import HealthDocument, SourceKind
from appliance.config_server.api.router import Router, ServerOf
from appliance.config_server.caller import NAME_CHARS_MAX, Caller
from appliance.config_server.watching.assessment import Assessment
from appliance.config_server.watching.health import machine_rpo
from appliance.config_server.watching.reason import Health, State
from appliance.config_server.watching.work_health import WorkKind
from replication.control.role import OperatorRole
from replication.errors import ConflictError, NotFoundError

router = Router("health")
UNWELL_LISTED_MAX = 500
_RANK = {state: rank for rank, state in enumerate(State)}


class SourceDocument(BaseModel):
    """A machine, a component, a schedule of drills or a job that left something, and its health.

    rpo_durable_seconds, rpo_restorable_seconds: of a machine that has points.
    """

    kind: SourceKind | WorkKind
    id: uuid.UUID
    name: str
    health: HealthDocument
    rpo_durable_seconds: float | None = None
    rpo_restorable_seconds: float | None = None


class Overview(BaseModel):
    """All in one: the worst state there is, how many are in which, and what is not normal.

    unwell: worst first, the first 500 of ``unwell_count``.
    """

    state: State
    at_ns: int
    machines: dict[State, int]
    components: dict[State, int]
    unwell_count: int
    unwell: list[SourceDocument]


@router.get("")
async def overview(server: ServerOf, _: Annotated[Caller, needs(OperatorRole.READER)]) -> Overview:
    """Tell whether all is well, and what is not."""
    assessment = await server.watching.watcher.current()
    now_ns = server.clock()
    machines = [one.health.state for one in assessment.machines.values()]
    components = [one.health.state for one in assessment.nodes.values()]
    components += [one.health.state for one in assessment.vcenters.values()]
    work = [one.health.state for one in assessment.work.values()]
    unwell = [
        (kind, source_id, name, health)
        for kind, source_id, name, health in _sources(assessment)
        if health.state is not State.NORMAL
    ]
    unwell.sort(key=lambda one: (-_RANK[one[3].state], one[0], one[2]))
    return Overview(
        state=max([*machines, *components, *work], key=_RANK.__getitem__, default=State.NORMAL),
        at_ns=assessment.at_ns,
        machines=_counts(machines),
        components=_counts(components),
        unwell_count=len(unwell),
        unwell=[_document(assessment, source, now_ns) for source in unwell[:UNWELL_LISTED_MAX]],
    )


@router.get("/{source}")
async def one(
    server: ServerOf,
    source: Annotated[str, Path(min_length=1, max_length=NAME_CHARS_MAX)],
    _: Annotated[Caller, needs(OperatorRole.READER)],
) -> SourceDocument:
    """Tell the health of a machine, a process server, an applier or a vCenter, by id or name.

    A name is looked up if no id fits; of those that have it, whose certificates are good count.
    """
    assessment = await server.watching.watcher.current()
    sources = list(_sources(assessment))
    found = [one for one in sources if source.lower() == str(one[1])]
    if not found:
        out = _without_certificate(assessment, server.clock())
        named = [one for one in sources if source == one[2]]
        found = [one for one in named if one[1] not in out] or named
    if not found:
        raise NotFoundError(
            f"there is no machine and no component called {source!r}",
            hint="GET machines and GET components list them",
        )
    if len(found) > 1:
        raise ConflictError(f"{source!r} names {len(found)} of them", hint="give the id")
    return _document(assessment, found[0], server.clock())


_Source = tuple[SourceKind | WorkKind, uuid.UUID, str, Health]


def _sources(assessment: Assessment) -> Iterator[_Source]:
    for machine in assessment.machines.values():
        yield "machine", machine.facts.id, machine.facts.name, machine.health
    for node in assessment.nodes.values():
        yield node.facts.kind, node.facts.id, node.facts.name, node.health
    for vcenter in assessment.vcenters.values():
        yield "vcenter", vcenter.facts.id, vcenter.facts.name, vcenter.health
    for work in assessment.work.values():
        yield work.facts.kind, work.facts.id, work.facts.name, work.health


def _without_certificate(assessment: Assessment, now_ns: int) -> frozenset[uuid.UUID]:
    """Machines and components whose certificates are over or revoked; and work, which has none."""
    ends = {one.facts.id: one.facts.certificate_ns for one in assessment.machines.values()}
    ends |= {one.facts.id: one.facts.certificate_ns for one in assessment.nodes.values()}
    ends |= dict.fromkeys(assessment.work, 0)
    return frozenset(source for source, end_ns in ends.items() if end_ns <= now_ns)


def _document(assessment: Assessment, source: _Source, now_ns: int) -> SourceDocument:
    kind, source_id, name, health = source
    document = SourceDocument(kind=kind, id=source_id, name=name, health=HealthDocument.of(health))
    machine = assessment.machines.get(source_id)
    if machine is not None:
        rpo = machine_rpo(machine.facts, now_ns)
        document.rpo_durable_seconds = rpo.durable_seconds
        document.rpo_restorable_seconds = rpo.restorable_seconds
    return document


def _counts(states: list[State]) -> dict[State, int]:
    tally = Counter(states)
    return {state: tally[state] for state in State}
