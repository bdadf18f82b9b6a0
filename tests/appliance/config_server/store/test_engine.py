"""The database as the rest of the program sees it, of both kinds."""

import asyncio
import time
import uuid

import pytest
from sqlalchemy import bindparam, func, select, text, update

from appliance.config_server.store import engine as engines
from appliance.config_server.store.engine import open_database
from appliance.config_server.store.schema import AuditEntry, Certificate, Policy, Setting, Token
from appliance.config_server.store.trouble import explained
from replication.errors import ConflictError, InputError, UnavailableError


def _token(name: str) -> Token:
    return Token(
        id=uuid.uuid4(),
        name=name,
        role="reader",
        digest=uuid.uuid4().hex,
        created_ns=1,
        expires_ns=2,
    )


def _policy(name: str) -> Policy:
    return Policy(
        id=uuid.uuid4(),
        name=name,
        kind="replication",
        rpo_threshold_seconds=900,
        retention_seconds=86400,
        crash_frequency_seconds=300,
        app_frequency_seconds=0,
        resync_window="",
        created_ns=1,
    )


async def test_what_is_written_is_there_after_reopening(database_url: str) -> None:
    async with open_database(database_url) as database, database.writing() as session:
        session.add(Setting(key="a", value={"b": [1, "ü", None]}))
    async with open_database(database_url) as database, database.reading() as session:
        found = await session.get(Setting, "a")
        assert found is not None
        assert found.value == {"b": [1, "ü", None]}


async def test_an_error_takes_the_whole_transaction_back(database_url: str) -> None:
    async with open_database(database_url) as database:

        async def fail() -> None:
            async with database.writing() as session:
                session.add(_token("a"))
                await session.flush()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        async with database.reading() as session:
            assert await session.scalar(select(func.count()).select_from(Token)) == 0


async def test_reading_changes_nothing(database_url: str) -> None:
    async with open_database(database_url) as database:
        async with database.reading() as session:
            session.add(_token("a"))
            await session.flush()
        async with database.reading() as session:
            assert await session.scalar(select(func.count()).select_from(Token)) == 0


async def test_writers_wait_for_each_other_instead_of_failing(database_url: str) -> None:
    """Each reads a value, takes its time, and writes one more: none is lost."""
    async with open_database(database_url) as first, open_database(database_url) as second:
        async with first.writing() as session:
            session.add(_policy("p"))

        async def count_up(turn: int) -> None:
            database = (first, second)[turn % 2]
            async with database.writing() as session:
                statement = select(Policy).where(Policy.name == "p").with_for_update()
                policy = (await session.scalars(statement)).one()
                await asyncio.sleep(0.005)
                policy.retention_seconds += 1

        await asyncio.gather(*(count_up(turn) for turn in range(30)))
        async with second.reading() as session:
            assert await session.scalar(select(Policy.retention_seconds)) == 86400 + 30


async def test_of_two_who_saw_one_revision_the_second_changes_nothing(database_url: str) -> None:
    async with open_database(database_url) as database:
        async with database.writing() as session:
            session.add(_policy("p"))

        async def change(retention: int) -> int:
            async with database.writing() as session:
                done = await session.execute(
                    update(Policy)
                    .where(Policy.name == "p", Policy.revision == 1)
                    .values(retention_seconds=retention, revision=2)
                    .returning(Policy.id)
                )
                return len(done.all())

        assert sorted(await asyncio.gather(*(change(n) for n in range(8)))) == [0] * 7 + [1]


async def test_readers_do_not_wait_for_a_writer(database_url: str) -> None:
    async with open_database(database_url) as database, database.writing() as session:
        session.add(_token("a"))
        await session.flush()
        started = time.monotonic()
        async with database.reading() as other:
            assert await other.scalar(select(func.count()).select_from(Token)) == 0
        assert time.monotonic() - started < 2


async def test_a_reader_sees_one_state_of_sqlite(tmp_path: object) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/store.db"
    count = select(func.count()).select_from(Token)
    async with open_database(url) as database, database.reading() as session:
        assert await session.scalar(count) == 0
        async with database.writing() as other:
            other.add(_token("a"))
        assert await session.scalar(count) == 0


async def test_a_name_that_is_taken_is_a_conflict(database_url: str) -> None:
    async with open_database(database_url) as database:
        with pytest.raises(ConflictError):
            async with database.writing() as session:
                session.add_all([_token("a"), _token("a")])


async def test_a_row_cannot_refer_to_one_that_is_not_there(database_url: str) -> None:
    orphan = Certificate(serial="1", node_id=uuid.uuid4(), key_digest="", issued_ns=0, expires_ns=0)
    async with open_database(database_url) as database:
        with pytest.raises(ConflictError):
            async with database.writing() as session:
                session.add(orphan)


async def test_a_value_that_cannot_be_stored_is_the_caller_s_fault(database_url: str) -> None:
    if database_url.startswith("sqlite"):
        return  # SQLite stores what PostgreSQL cannot
    async with open_database(database_url) as database:
        with pytest.raises(InputError):
            async with database.writing() as session:
                session.add(_token("a\0b"))


async def test_who_waits_too_long_for_its_turn_is_told(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "WRITE_WAIT_SECONDS_MAX", 0.1)
    url = f"sqlite+aiosqlite:///{tmp_path}/store.db"
    async with open_database(url) as database, database.writing():
        with pytest.raises(UnavailableError):
            async with database.writing():
                pass


async def test_a_cancelled_writer_leaves_nothing_and_blocks_nobody(database_url: str) -> None:
    async with open_database(database_url) as database:

        async def write() -> None:
            async with database.writing() as session:
                session.add(_token("a"))
                await session.flush()
                await asyncio.sleep(60)

        for _ in range(12):  # more than there are connections
            writing = asyncio.create_task(write())
            await asyncio.sleep(0.02)
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        async with database.writing() as session:
            assert await session.scalar(select(func.count()).select_from(Token)) == 0
            session.add(_token("a"))


async def test_a_look_up_sees_what_was_committed_and_survives_being_cancelled(
    database_url: str,
) -> None:
    by_name = select(Token.role).where(Token.name == bindparam("name"))
    async with open_database(database_url) as database:
        assert await database.look_up(by_name, name="a") is None
        async with database.writing() as session:
            session.add(_token("a"))
            await session.flush()
            assert await database.look_up(by_name, name="a") is None
        for turn in range(50):
            looking = asyncio.create_task(database.look_up(by_name, name="a"))
            await asyncio.sleep(turn % 5 * 0.0003)
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        row = await database.look_up(by_name, name="a")
        assert row is not None
        assert row.role == "reader"
        async with database.writing() as session:
            await session.execute(update(Token).values(role="operator"))
        row = await database.look_up(by_name, name="a")
        assert row is not None
        assert row.role == "operator"


async def test_sqlite_is_set_as_the_program_relies_upon(tmp_path: object) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/store.db"
    async with open_database(url) as database, database.reading() as session:
        told = {
            name: await session.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert told == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 20000,
    }


async def test_rows_count_up_by_themselves(database_url: str) -> None:
    async with open_database(database_url) as database, database.writing() as session:
        entries = [
            AuditEntry(
                at_ns=2**62, who="", role="", source="", action="", target="", outcome="", detail={}
            )
            for _ in range(3)
        ]
        session.add_all(entries)
        await session.flush()
        first = entries[0].id
        assert [entry.id for entry in entries] == [first, first + 1, first + 2]


async def test_a_server_that_does_not_answer_is_unavailable(tmp_path: object) -> None:
    url = f"postgresql+psycopg://nobody:secret@/x?host={tmp_path}"
    with pytest.raises(UnavailableError) as told:
        async with open_database(url):
            pass
    assert "secret" not in str(told.value)


def test_a_number_that_is_too_large_is_the_caller_s_fault() -> None:
    with pytest.raises(InputError, match="cannot be stored"), explained():
        raise OverflowError
