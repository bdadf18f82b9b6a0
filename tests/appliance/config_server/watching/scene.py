"""Nodes, a machine and a policy in the database, as the other parts write them."""

import time
import uuid
from collections.abc import Mapping
from typing import Any

from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import (
    Certificate,
    Job,
    Machine,
    Node,
    Policy,
    VCenter,
)
from replication.control.report import (
    ApplierReport,
    Load,
    MachineReport,
    Phase,
    ProcessServerReport,
    Report,
    StoreReport,
    StreamReport,
)
from replication.control.role import NodeRole

NS = 1_000_000_000
DAY_NS = 86400 * NS
MACHINE = uuid.UUID(int=1)
PROCESS_SERVER = uuid.UUID(int=2)
APPLIER = uuid.UUID(int=3)
VCENTER = uuid.UUID(int=4)
POLICY = uuid.UUID(int=5)


def machine_report(now_ns: int, **changes: Any) -> MachineReport:
    fields: dict[str, Any] = {
        "time_ns": now_ns,
        "phase": Phase.REPLICATING,
        "consistency": "crash-consistent",
        "durable_ns": now_ns - 5 * NS,
        "restorable_ns": now_ns - 8 * NS,
    }
    return MachineReport(**(fields | changes))


def process_server_report(now_ns: int, cpu_share: float = 0.2) -> ProcessServerReport:
    return ProcessServerReport(
        time_ns=now_ns,
        software="1.2",
        url="https://ps:9443",
        load=Load(cpu_share=cpu_share, memory_bytes=1000, memory_used_bytes=400),
        spool_bytes=100,
        spool_max_bytes=1000,
        free_bytes=5000,
        streams=(StreamReport(machine=MACHINE, backlog_seconds=2.0),),
    )


def applier_report(now_ns: int) -> ApplierReport:
    return ApplierReport(
        time_ns=now_ns,
        free_bytes=100 << 30,
        stores=(
            StoreReport(
                machine=MACHINE, newest_ns=now_ns - 7 * NS, point_count=3, space_bytes=10 << 30
            ),
        ),
    )


async def report(database: Database, node: uuid.UUID, told: Report, now_ns: int) -> None:
    """As if ``node`` had reported at ``now_ns``."""
    await report_some(database, {node: told}, now_ns)


async def report_some(database: Database, reports: Mapping[uuid.UUID, Report], now_ns: int) -> None:
    """As the book writes them: together."""
    async with database.writing() as session:
        for node, told in reports.items():
            row = await session.get(Node, node)
            assert row is not None
            row.report = told.model_dump(mode="json")
            row.seen_ns = now_ns


async def report_all(database: Database, now_ns: int, *, cpu_share: float = 0.2) -> None:
    """All three, and well but for the process server's CPU."""
    reports: dict[uuid.UUID, Report] = {
        MACHINE: machine_report(now_ns),
        PROCESS_SERVER: process_server_report(now_ns, cpu_share),
        APPLIER: applier_report(now_ns),
    }
    await report_some(database, reports, now_ns)


async def set_scene(database: Database, now_ns: int | None = None) -> None:
    """A protected machine and what it needs, all of it well."""
    now_ns = now_ns or time.time_ns()
    async with database.writing() as session:
        for node, role, name in (
            (MACHINE, NodeRole.MACHINE, "db-01"),
            (PROCESS_SERVER, NodeRole.PROCESS_SERVER, "ps-1"),
            (APPLIER, NodeRole.APPLIER, "applier-1"),
        ):
            session.add(Node(id=node, role=role, name=name, enrolled_ns=now_ns - DAY_NS))
        session.add(
            Policy(
                id=POLICY,
                name="standard",
                kind="replication",
                rpo_threshold_seconds=900,
                retention_seconds=86400,
                crash_frequency_seconds=300,
                app_frequency_seconds=0,
                resync_window="22:00-06:00",
                created_ns=now_ns - DAY_NS,
            )
        )
        session.add(
            VCenter(
                id=VCENTER,
                name="vc-1",
                url="https://vc",
                username="u",
                password=b"sealed",
                ca_pem="",
                added_ns=now_ns - DAY_NS,
                state="connected",
                seen_ns=now_ns,
            )
        )
        await session.flush()
        for node in (MACHINE, PROCESS_SERVER, APPLIER):
            session.add(
                Certificate(
                    serial=f"{node.int:x}",
                    node_id=node,
                    key_digest="0" * 64,
                    issued_ns=now_ns - DAY_NS,
                    expires_ns=now_ns + 60 * DAY_NS,
                )
            )
        session.add(
            Machine(
                id=MACHINE,
                name="db-01",
                policy_id=POLICY,
                process_server_id=PROCESS_SERVER,
                applier_id=APPLIER,
                state="protected",
                since_ns=now_ns - DAY_NS,
            )
        )
    await report_all(database, now_ns)


async def add_job(
    database: Database, job_id: str, state: str, now_ns: int, error: str = ""
) -> None:
    async with database.writing() as session:
        session.add(
            Job(
                id=job_id,
                kind="protect",
                target_id=MACHINE,
                target="db-01",
                state=state,
                request={},
                steps=[],
                error={"code": "x", "message": error} if error else None,
                asked_by="ci",
                created_ns=now_ns,
                updated_ns=now_ns,
            )
        )
