"""Versions, reports and windows on both databases."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator

import pytest

from appliance.config_server.nodes.part import Nodes, open_nodes
from appliance.config_server.nodes.report_book import ReportBook
from appliance.config_server.nodes.versions import Versions
from appliance.config_server.nodes.windows import follow_windows
from appliance.config_server.store.engine import Database, open_database
from appliance.config_server.store.schema import Machine, Node, Policy
from replication.control.report import MachineReport, ProcessServerReport
from replication.control.role import NodeRole
from replication.errors import LimitError

ONE, TWO = uuid.UUID(int=1), uuid.UUID(int=2)
HOUR_NS = 3600 * 10**9


@contextlib.asynccontextmanager
async def database_at(url: str) -> AsyncIterator[Database]:
    async with open_database(url) as database:
        async with database.writing() as session:
            for node, role in ((ONE, NodeRole.MACHINE), (TWO, NodeRole.PROCESS_SERVER)):
                session.add(Node(id=node, role=role, name=str(node), enrolled_ns=0))
        yield database


async def version_of(database: Database, node: uuid.UUID) -> int:
    async with database.reading() as session:
        row = await session.get(Node, node)
    assert row is not None
    return row.assignment_version


async def test_who_waits_wakes_when_the_change_is_there_and_not_before(database_url: str) -> None:
    async with database_at(database_url) as database:
        versions = Versions(database)
        with versions.waiters.waiting(ONE) as news, versions.waiters.waiting(TWO) as other:
            async with database.writing() as session:
                await versions.bump(session, [ONE, uuid.uuid4()])
                await asyncio.sleep(0)
                assert not news.is_set()
            assert news.is_set()
            assert not other.is_set()
        assert await version_of(database, ONE) == 2
        assert await version_of(database, TWO) == 1


async def test_what_is_rolled_back_wakes_nobody(database_url: str) -> None:
    async with database_at(database_url) as database:
        versions = Versions(database)
        with versions.waiters.waiting(ONE) as news:
            with contextlib.suppress(ZeroDivisionError):
                async with database.writing() as session:
                    await versions.bump(session, [ONE])
                    raise ZeroDivisionError
            assert not news.is_set()
        assert await version_of(database, ONE) == 1


async def test_a_change_of_another_config_server_wakes_within_two_seconds(
    database_url: str,
) -> None:
    async with database_at(database_url) as database, open_database(database_url) as another:
        here, there = Versions(database), Versions(another)
        async with here.looking():
            with here.waiters.waiting(ONE) as news:
                await asyncio.sleep(1.5)
                news.clear()
                began = time.monotonic()
                async with another.writing() as session:
                    await there.bump(session, [ONE])
                async with asyncio.timeout(10):
                    await news.wait()
                assert time.monotonic() - began < 4.0  # 2 s, on a machine with nothing to do


async def test_a_node_waits_once_and_all_wait_within_bounds(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.config_server.nodes.versions.WAITERS_MAX", 2)
    async with open_database(database_url) as database:
        waiters = Versions(database).waiters
        with waiters.waiting(ONE) as older, waiters.waiting(ONE) as newer:
            assert older.is_set()
            assert not newer.is_set()
            with (
                waiters.waiting(TWO),
                pytest.raises(LimitError),
                waiters.waiting(uuid.UUID(int=3)),
            ):
                pass
        assert waiters.nodes == frozenset()


async def test_reports_are_written_together_and_the_newest_wins(database_url: str) -> None:
    async with database_at(database_url) as database:
        book, another = ReportBook(database), ReportBook(database)
        for number in range(5):
            book.put(ONE, MachineReport(time_ns=number, hostname=f"h{number}"), 100 + number)
        book.put(TWO, ProcessServerReport(time_ns=1, url="https://x"), 50)
        assert await book.flush() == 2
        assert await book.flush() == 0
        another.put(ONE, MachineReport(time_ns=9, hostname="old"), 90)
        assert await another.flush() == 1
        async with database.reading() as session:
            row = await session.get(Node, ONE)
        assert row is not None
        assert row.report is not None
        assert (row.seen_ns, row.report["hostname"]) == (104, "h4")
        newest = book.newest(ONE)
        assert newest is not None
        assert newest.report == MachineReport(time_ns=4, hostname="h4")


async def test_what_was_heard_last_is_written_at_the_end(database_url: str) -> None:
    async with database_at(database_url) as database:
        async with open_nodes(database, time.time_ns) as nodes:
            nodes.book.put(ONE, MachineReport(time_ns=1), 77)
        async with database.reading() as session:
            row = await session.get(Node, ONE)
        assert row is not None
        assert row.seen_ns == 77


async def test_agents_are_told_when_their_process_server_moves(database_url: str) -> None:
    async with database_at(database_url) as database, open_nodes(database, lambda: 1) as nodes:
        async with database.writing() as session:
            session.add(
                Machine(id=ONE, name="web", process_server_id=TWO, state="protected", since_ns=0)
            )
        for url, version in (("https://a", 2), ("https://a", 2), ("https://b", 3)):
            await nodes.take_report(database, TWO, ProcessServerReport(time_ns=1, url=url), 5)
            assert await version_of(database, ONE) == version
            async with database.reading() as session:
                node = await session.get(Node, ONE)
                assert node is not None
                told = await nodes.assignment(session, node, 1)
            assert told.model_dump()["process_server"] == url


async def test_a_process_server_that_moved_is_where_it_said_last_to_whichever_config_server(
    database_url: str,
) -> None:
    async with database_at(database_url) as database:
        here = Nodes(Versions(database), ReportBook(database))
        there = Nodes(Versions(database), ReportBook(database))

        async def told(nodes: Nodes) -> str:
            async with database.reading() as session:
                return await nodes.url_of(session, TWO)

        assert await told(here) == ""
        here.book.put(TWO, ProcessServerReport(time_ns=1, url="https://old"), 10)
        assert await told(here) == "https://old"
        there.book.put(TWO, ProcessServerReport(time_ns=2, url="https://new"), 20)
        await there.book.flush()
        assert [await told(here), await told(there)] == ["https://new", "https://new"]
        here.book.put(TWO, ProcessServerReport(time_ns=3, url="https://newest"), 30)
        assert await told(here) == "https://newest"


async def test_a_window_that_opens_and_closes_is_told(database_url: str) -> None:
    async with database_at(database_url) as database:
        async with database.writing() as session:
            policy = Policy(
                id=uuid.uuid4(),
                name="gold",
                kind="replication",
                rpo_threshold_seconds=900,
                retention_seconds=86400,
                crash_frequency_seconds=300,
                app_frequency_seconds=0,
                resync_window="22:00-06:00",
                created_ns=0,
            )
            session.add(policy)
            await session.flush()
            session.add(
                Machine(id=ONE, name="web", policy_id=policy.id, state="protected", since_ns=0)
            )
        told = [
            await follow_windows(database, Versions(database), hour * HOUR_NS)
            for hour in (12, 13, 22, 23, 29, 30, 31)
        ]
        assert told == [1, 0, 1, 0, 0, 1, 0]
        assert await version_of(database, ONE) == 4
