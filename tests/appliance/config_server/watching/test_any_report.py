"""Whatever validates as a report can be stored, read, assessed and followed."""

import json
import uuid
from collections.abc import Mapping
from typing import Any

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from appliance.config_server.nodes.report_book import ReportBook
from appliance.config_server.nodes.versions import Versions
from appliance.config_server.protection.observer import Observer
from appliance.config_server.protection.table import State as Protection
from appliance.config_server.protection.workflow import Ports
from appliance.config_server.store.engine import open_database
from appliance.config_server.store.schema import Machine, ProtectedDisk
from appliance.config_server.watching.assessment import Findings, MachineRow, Memory, assess
from appliance.config_server.watching.component_health import NodeFacts
from appliance.config_server.watching.config import WatchingConfig
from appliance.config_server.watching.health import MachineFacts
from appliance.config_server.watching.watcher import Watcher
from daemon.service import Health
from replication.control.report import (
    MachineReport,
    Phase,
    Report,
    ResyncCause,
    read_report,
)
from replication.control.role import NodeRole
from replication.control.value import COUNT_MAX, SECONDS_MAX
from tests.appliance.config_server.watching.scene import (
    APPLIER,
    MACHINE,
    NS,
    PROCESS_SERVER,
    set_scene,
)

NOW_NS = 1_800_000_000 * NS
NODES = {"machine": MACHINE, "process-server": PROCESS_SERVER, "applier": APPLIER}

counts = st.sampled_from([0, 1, NOW_NS, COUNT_MAX - 1, COUNT_MAX]) | st.integers(0, COUNT_MAX)
seconds = st.sampled_from([0.0, 5e-324, SECONDS_MAX]) | st.floats(0, SECONDS_MAX)
texts = st.sampled_from(["", "x", "\x1b[31m\r\n", "\U0010ffff", "%s {0}", "y" * 2000]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20
)
wrong_numbers = [-1, 2**63, -(2**63), 10**400, float("inf"), float("nan"), 1e308, -1e308, True]
wrong: st.SearchStrategy[Any] = st.sampled_from(
    [*wrong_numbers, "\0", "a\0b", "\ud800", "z" * 2001, None, [], {}]
)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A document that may leave any of its fields out."""
    return st.fixed_dictionaries({}, optional=fields)


def with_always(
    document: st.SearchStrategy[dict[str, Any]], **always: st.SearchStrategy[Any]
) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(document, st.fixed_dictionaries(always)).map(lambda both: both[0] | both[1])


troubles = st.lists(
    st.fixed_dictionaries(
        {"part": texts, "severity": st.sampled_from(["warning", "critical"]), "reason": texts}
    ),
    max_size=3,
)
common: dict[str, st.SearchStrategy[Any]] = {
    "software": texts,
    "started_ns": counts,
    "assignment": counts,
    "load": some(
        cpu_share=st.none() | st.floats(0, 1), memory_bytes=counts, memory_used_bytes=counts
    ),
    "troubles": troubles,
}
numbers = dict.fromkeys(
    [
        "generation",
        "committed",
        "durable_ns",
        "restorable_ns",
        "todo_bytes",
        "done_bytes",
        "total_bytes",
        "changed_bytes",
        "sent_bytes",
        "app_consistent_ns",
        "resync_request",
    ],
    counts,
)
devices = st.lists(
    with_always(
        some(mounts=st.lists(texts, max_size=2), is_system=st.booleans(), reason=texts),
        id=st.just("wwn-0") | texts,
        device=texts,
        size_bytes=counts,
    ),
    max_size=2,
)
machine_ids = st.sampled_from([str(MACHINE), str(uuid.UUID(int=77))])
reports: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "machine": some(
        **common,
        **numbers,
        hostname=texts,
        phase=st.sampled_from([*Phase]),
        cause=st.sampled_from([None, *ResyncCause]),
        reason=texts,
        skew_ns=st.integers(-COUNT_MAX, COUNT_MAX),
        consistency=texts | st.just("none"),
        devices=devices,
    ),
    "process-server": some(
        **common,
        url=texts,
        spool_bytes=counts,
        spool_max_bytes=counts,
        free_bytes=counts,
        streams=st.lists(
            with_always(
                some(durable_ns=counts, backlog_bytes=counts, backlog_seconds=seconds),
                machine=machine_ids,
            ),
            max_size=2,
        ),
    ),
    "applier": some(
        **common,
        free_bytes=counts,
        stores=st.lists(
            with_always(
                some(
                    generation=counts,
                    applied=counts,
                    newest_ns=counts,
                    newest_app_ns=counts,
                    space_bytes=counts,
                    open_repairs=counts,
                    lost=texts,
                    removed=st.booleans(),
                ),
                machine=machine_ids,
            ),
            max_size=2,
        ),
    ),
}


@st.composite
def said(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """What a node sends: mostly a report, sometimes with something in it that is wrong."""
    document = {**draw(reports[kind]), "kind": kind, "time_ns": draw(counts)}
    place: Any = document
    if draw(st.integers(0, 3)) == 0:
        while True:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or not place[key]:
                break
            place = place[key]
        place[key] = draw(wrong)
    # As it comes off the wire, where Infinity and NaN are numbers.
    sent: dict[str, Any] = json.loads(json.dumps(document))
    return sent


all_said = st.fixed_dictionaries({kind: said(kind) for kind in reports})
states = st.sampled_from([*Protection])


def accepted(documents: Mapping[str, object]) -> dict[str, Report]:
    found = {kind: read_report(document) for kind, document in documents.items()}
    event(f"{sum(one is not None for one in found.values())} of 3 are reports")
    return {kind: one for kind, one in found.items() if one is not None}


@given(all_said, states, counts)
@settings(max_examples=300, deadline=None)
def test_any_report_can_be_assessed(
    documents: dict[str, Any], state: Protection, since_ns: int
) -> None:
    heard = accepted(documents)
    machine = heard.get("machine")
    facts = MachineFacts(
        MACHINE,
        "db-01",
        state,
        since_ns,
        rpo_threshold_seconds=900,
        app_frequency_seconds=3600,
        report=machine if isinstance(machine, MachineReport) else None,
        received_ns=NOW_NS,
        certificate_ns=NOW_NS,
    )
    nodes = tuple(
        NodeFacts(NODES[role], role, role, since_ns, heard.get(role), NOW_NS)
        for role in (NodeRole.PROCESS_SERVER, NodeRole.APPLIER)
    )
    findings = Findings((MachineRow(facts, PROCESS_SERVER, APPLIER),), nodes)
    memory = Memory()
    for now_ns in (NOW_NS, NOW_NS + 86400 * NS):
        assessment, memory = assess(findings, memory, now_ns)
        assert assessment.defects == {}
        assert set(assessment.sources()) == {MACHINE, PROCESS_SERVER, APPLIER}
        json.dumps([health.reasons for _, health in assessment.sources().values()], default=str)


@given(documents=all_said, state=states)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_any_report_can_be_stored_read_and_followed(
    database_url: str, documents: dict[str, Any], state: Protection
) -> None:
    async with open_database(database_url) as database:
        async with database.writing() as session:
            fresh = await session.get(Machine, MACHINE) is None
        if fresh:
            await set_scene(database, NOW_NS)
        async with database.writing() as session:
            machine = await session.get_one(Machine, MACHINE)
            machine.state, machine.resync_request, machine.points = state, 0, "kept"
            if fresh:
                session.add(
                    ProtectedDisk(
                        machine_id=MACHINE,
                        index=0,
                        device_id="wwn-0",
                        device="/dev/sda",
                        name="sda",
                        size_bytes=1,
                    )
                )
        book = ReportBook(database)
        heard = accepted(documents)
        for kind, report in heard.items():
            book.put(NODES[kind], report, NOW_NS)
        assert await book.flush() == len(heard)

        health = Health()
        watcher = Watcher(database, WatchingConfig(settle_seconds=0), health, lambda: NOW_NS)
        assessment = await watcher.look()
        assert assessment.defects == {}
        told = {node: one.facts.report for node, one in assessment.nodes.items()}
        told[MACHINE] = assessment.machines[MACHINE].facts.report
        for kind, report in heard.items():
            assert told[NODES[kind]] == report, "as it was said"

        versions = Versions(database)

        async def ensure_key(_: object, __: uuid.UUID) -> None:
            raise AssertionError

        observer = Observer(
            database, Ports(versions.bump, ensure_key, lambda _: None), lambda: NOW_NS
        )
        await observer.look()
        assert observer.defects == {}
