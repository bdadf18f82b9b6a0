"""``components``: process servers, appliers, compute nodes and vCenters, their load and health.

Source: docs/CONTROL.md §10.
"""

import uuid
from collections import Counter
from typing import Annotated

from pydantic import BaseModel

from appliance.config_server.api.access import needs
from appliance.config_server.api.documents import NS, HealthDocument, SourceKind
from appliance.config_server.api.paging import Page, PagingOf, decode_cursor, encode_cursor
from appliance.config_server.api.router import Router, ServerOf
from appliance.config_server.caller import Caller
from appliance.config_server.watching.assessment import (
    AssessedNode,
    AssessedVCenter,
    Assessment,
)
from appliance.config_server.watching.component_health import backlog_seconds
from replication.control.report import ApplierReport, ComputeReport, ProcessServerReport
from replication.control.role import OperatorRole

router = Router("components")


class ComponentDocument(BaseModel):
    """A component. What does not go with its kind, or is not known, is null.

    seen_ns:      when it was last heard of, by the config server's clock; 0: never.
    skew_seconds: its clock less the config server's.
    free_bytes:   below the spool, the store or the virtual machines' disks.
    store_bytes:  what recovery points, or virtual machines' disks, take.
    machine_count: machines that it serves; of a compute node: virtual machines.
    accelerator:  of a compute node: kvm or tcg.
    """

    kind: SourceKind
    id: uuid.UUID
    name: str
    health: HealthDocument
    seen_ns: int
    software: str = ""
    url: str = ""
    skew_seconds: float | None = None
    cpu_share: float | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    spool_bytes: int | None = None
    spool_max_bytes: int | None = None
    backlog_seconds: float | None = None
    free_bytes: int | None = None
    store_bytes: int | None = None
    certificate_expires_ns: int | None = None
    machine_count: int | None = None
    accelerator: str | None = None


@router.get("")
async def list_components(
    server: ServerOf, paging: PagingOf, _: Annotated[Caller, needs(OperatorRole.READER)]
) -> Page[ComponentDocument]:
    """List process servers, appliers, compute nodes and vCenters by kind and name."""
    assessment = await server.watching.watcher.current()
    served = _served(assessment)
    items = [
        *(_node(node, served[node.facts.id]) for node in assessment.nodes.values()),
        *(_vcenter(vcenter) for vcenter in assessment.vcenters.values()),
    ]
    items.sort(key=_key)
    if paging.cursor is not None:
        after = tuple(decode_cursor(paging.cursor, [str, str, str]))
        items = [item for item in items if _key(item) > after]
    page = items[: paging.limit]
    following = encode_cursor(_key(page[-1])) if len(items) > len(page) else None
    return Page(items=page, next=following)


def _key(item: ComponentDocument) -> tuple[str, str, str]:
    return item.kind, item.name, str(item.id)


def _served(assessment: Assessment) -> Counter[uuid.UUID]:
    """How many machines each node serves."""
    return Counter(
        node
        for machine in assessment.machines.values()
        for node in (machine.process_server_id, machine.applier_id)
        if node is not None
    )


def _node(node: AssessedNode, machine_count: int) -> ComponentDocument:
    facts, report = node.facts, node.facts.report
    document = ComponentDocument(
        kind=facts.kind,
        id=facts.id,
        name=facts.name,
        health=HealthDocument.of(node.health),
        seen_ns=facts.received_ns,
        certificate_expires_ns=facts.certificate_ns or None,
        machine_count=machine_count,
    )
    if report is None:
        return document
    document.software = report.software
    document.skew_seconds = (report.time_ns - facts.received_ns) / NS
    document.cpu_share = report.load.cpu_share
    if report.load.memory_bytes:
        document.memory_bytes = report.load.memory_bytes
        document.memory_used_bytes = report.load.memory_used_bytes
    if isinstance(report, ProcessServerReport):
        document.url = report.url
        document.spool_bytes = report.spool_bytes
        document.spool_max_bytes = report.spool_max_bytes
        document.backlog_seconds = backlog_seconds(report)
        document.free_bytes = report.free_bytes
    if isinstance(report, ApplierReport):
        document.free_bytes = report.free_bytes
        document.store_bytes = sum(store.space_bytes for store in report.stores)
    if isinstance(report, ComputeReport):
        document.free_bytes = report.free_bytes
        document.store_bytes = sum(vm.space_bytes for vm in report.vms)
        document.machine_count = len(report.vms)
        document.accelerator = report.accelerator
    return document


def _vcenter(vcenter: AssessedVCenter) -> ComponentDocument:
    facts = vcenter.facts
    return ComponentDocument(
        kind="vcenter",
        id=facts.id,
        name=facts.name,
        health=HealthDocument.of(vcenter.health),
        seen_ns=facts.seen_ns,
    )
