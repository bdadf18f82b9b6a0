"""What cannot be stored of one node harms no other, on both databases."""

import uuid

import pytest
from structlog.testing import capture_logs

from appliance.config_server.nodes.report_book import (
    FLUSHED_AT_ONCE_MAX,
    Heard,
    ReportBook,
    newest_of,
)
from appliance.config_server.store.engine import Database, open_database
from appliance.config_server.store.schema import Node
from replication.control.report import Load, MachineReport, Report
from replication.control.role import NodeRole
from replication.errors import ReplicationError

NODES = [uuid.UUID(int=number) for number in range(1, 5)]
BAD, *GOOD = NODES
HUGE_NS = 2**63
"""A time that no column takes; PostgreSQL says so, SQLite's driver does."""


async def furnish(database: Database) -> None:
    async with database.writing() as session:
        for node in NODES:
            session.add(Node(id=node, role=NodeRole.MACHINE, name=str(node), enrolled_ns=0))


async def seen(database: Database) -> dict[uuid.UUID, int]:
    async with database.reading() as session:
        return {node: (await session.get_one(Node, node)).seen_ns for node in NODES}


def unserialisable() -> Report:
    return MachineReport.model_construct(kind="machine", time_ns=1, hostname=object())


def not_json() -> Report:
    """NaN: SQLite's JSON column is text and takes it, PostgreSQL's does not."""
    return MachineReport(time_ns=1, load=Load.model_construct(cpu_share=float("nan")))


@pytest.mark.parametrize(
    ("report", "heard_ns"),
    [(MachineReport(time_ns=1), HUGE_NS), (unserialisable(), 7)],
    ids=["a time beyond all columns", "no JSON at all"],
)
async def test_one_that_cannot_be_stored_is_dropped_and_told_once(
    database_url: str, report: Report, heard_ns: int
) -> None:
    async with open_database(database_url) as database:
        await furnish(database)
        book = ReportBook(database)
        with capture_logs() as logs:
            for now_ns in (10, 20):
                book.put(BAD, report, heard_ns)
                for node in GOOD:
                    book.put(node, MachineReport(time_ns=now_ns), now_ns)
                assert await book.flush() == len(GOOD)
                assert await seen(database) == {BAD: 0, **dict.fromkeys(GOOD, now_ns)}
        assert [(log["log_level"], log["node"]) for log in logs] == [("error", str(BAD))]
        book.put(BAD, MachineReport(time_ns=3), 30)
        assert await book.flush() == 1
        assert (await seen(database))[BAD] == 30


async def test_what_is_no_json_harms_only_its_node(database_url: str) -> None:
    async with open_database(database_url) as database:
        await furnish(database)
        book = ReportBook(database)
        book.put(BAD, not_json(), 5)
        for node in GOOD:
            book.put(node, MachineReport(time_ns=1), 5)
        assert await book.flush() >= len(GOOD)
        assert {node: (await seen(database))[node] for node in GOOD} == dict.fromkeys(GOOD, 5)
        async with database.reading() as session:
            row = await session.get_one(Node, BAD)
            assert newest_of(row, None) is None, "what was stored of it is no report"


async def test_the_next_batch_is_written_too(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.config_server.nodes.report_book.FLUSHED_AT_ONCE_MAX", 1)
    assert FLUSHED_AT_ONCE_MAX > 1
    async with open_database(database_url) as database:
        await furnish(database)
        book = ReportBook(database)
        for node in NODES:
            book.put(node, MachineReport(time_ns=1), HUGE_NS if node == BAD else 5)
        assert await book.flush() == len(GOOD)
        assert await seen(database) == {BAD: 0, **dict.fromkeys(GOOD, 5)}


async def test_what_a_database_that_is_away_refuses_stays(database_url: str) -> None:
    async with open_database(database_url) as database:
        await furnish(database)
        book = ReportBook(database)
        book.put(BAD, MachineReport(time_ns=1), 5)
        async with database.writing() as session:
            connection = await session.connection()
            await connection.exec_driver_sql("ALTER TABLE nodes RENAME TO elsewhere")
        with pytest.raises(ReplicationError):
            await book.flush()
        async with database.writing() as session:
            connection = await session.connection()
            await connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO nodes")
        assert await book.flush() == 1


def test_a_stored_report_that_is_none_does_not_hide_what_was_heard() -> None:
    heard = Heard(5, MachineReport(time_ns=1))
    good = MachineReport(time_ns=2).model_dump(mode="json")
    for document, seen_ns, expected in (
        (None, 9, heard),
        ({**good, "time_ns": 10**400}, 9, heard),
        ({**good, "reason": "\0"}, 9, heard),
        (good, 5, heard),
        (good, 6, Heard(6, MachineReport(time_ns=2))),
    ):
        row = Node(id=GOOD[0], role="machine", name="x", enrolled_ns=0)
        row.report, row.seen_ns = document, seen_ns
        assert newest_of(row, heard) == expected
