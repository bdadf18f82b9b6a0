"""From any schema there was to the present one; what must not be touched is not."""

import asyncio
import hashlib
import os
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, select, text

from appliance.config_server.store import migration
from appliance.config_server.store.connection import make_engine
from appliance.config_server.store.engine import open_database
from appliance.config_server.store.migration import current_revision, head_revision, migrate
from appliance.config_server.store.recovery_tables import Failover
from appliance.config_server.store.schema import Base, Token
from replication.errors import ConfigError, IntegrityError, StorageError, UnavailableError

ROOT = Path(__file__).parents[4]


def _url(path: Path) -> str:
    return f"sqlite+aiosqlite:///{path}"


async def _execute(url: str, *statements: str) -> None:
    engine = make_engine(url)
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))
    await engine.dispose()


async def test_migrations_make_exactly_the_tables_of_the_schema(database_url: str) -> None:
    await migrate(database_url)
    engine = make_engine(database_url)

    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, Base.metadata))

    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []
        assert Failover.__tablename__ in Base.metadata.tables
    await engine.dispose()


async def test_a_database_of_the_first_schema_migrates_with_its_data(database_url: str) -> None:
    await migrate(database_url, target="0001")
    assert await current_revision(database_url) == "0001"
    await _execute(
        database_url,
        "INSERT INTO tokens (id, name, role, digest, created_ns, expires_ns)"
        f" VALUES ('{uuid.uuid4().hex}', 'old', 'reader', 'd', 1, 2)",
    )
    async with open_database(database_url) as database, database.reading() as session:
        row = (await session.scalars(select(Token))).one()
        assert (row.name, row.digest, row.created_by) == ("old", "d", "")
    assert await current_revision(database_url) == head_revision() != "0001"


def test_migrations_are_named_after_their_revisions() -> None:
    config = Config()
    config.set_main_option("script_location", migration._SCRIPTS)
    scripts = ScriptDirectory.from_config(config)
    assert {script.revision for script in scripts.walk_revisions()} == migration._revisions()
    assert scripts.get_current_head() == head_revision()


def test_a_start_that_finds_the_present_schema_loads_no_alembic(tmp_path: Path) -> None:
    url = _url(tmp_path / "store.db")
    asyncio.run(migrate(url))
    program = (
        "import asyncio, sys; from appliance.config_server.store.migration import migrate; "
        f"asyncio.run(migrate({url!r})); sys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0


async def test_migrating_again_changes_nothing(database_url: str) -> None:
    await migrate(database_url)
    await migrate(database_url)
    assert await current_revision(database_url) == head_revision()


async def test_several_starts_at_once_migrate_once(database_url: str) -> None:
    await asyncio.gather(*(migrate(database_url) for _ in range(5)))
    assert await current_revision(database_url) == head_revision()


async def test_a_newer_database_is_refused_and_left_alone(database_url: str) -> None:
    await migrate(database_url)
    await _execute(
        database_url,
        "UPDATE alembic_version SET version_num = '9999'",
        "ALTER TABLE tokens ADD COLUMN news INTEGER",
    )
    with pytest.raises(ConfigError, match=r"9999.*knows up to") as told:
        await migrate(database_url)
    assert told.value.hint
    await _execute(database_url, "SELECT news FROM tokens")
    assert await current_revision(database_url) == "9999"


async def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE songs (name TEXT)")
    other.close()
    before = _digest(path)
    with pytest.raises(ConfigError, match="something else"):
        await migrate(_url(path))
    assert _digest(path) == before


async def test_tables_without_a_schema_s_number_are_refused(database_url: str) -> None:
    await _empty(database_url)
    await _execute(database_url, "CREATE TABLE tokens (name TEXT)")
    with pytest.raises(ConfigError, match="something else: tokens"):
        await migrate(database_url)


async def test_what_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"this is a letter to my aunt\n" * 1000)
    before = _digest(path)
    with pytest.raises(IntegrityError, match="not a database") as told:
        await migrate(_url(path))
    assert told.value.exit_code == 6
    assert _digest(path) == before
    assert os.listdir(tmp_path) == ["store.db", "store.db.lock"]


@pytest.mark.parametrize("page", [1, 3, 7])
async def test_a_damaged_database_is_refused_and_left_alone(tmp_path: Path, page: int) -> None:
    path = tmp_path / "store.db"
    await migrate(_url(path))
    raw = bytearray(path.read_bytes())
    raw[4096 * page : 4096 * page + 2000] = os.urandom(2000)
    path.write_bytes(raw)
    before = _digest(path)
    with pytest.raises(IntegrityError, match="damaged") as told:
        await migrate(_url(path))
    assert "backup" in str(told.value.hint)
    assert _digest(path) == before


async def test_a_truncated_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await migrate(_url(path))
    os.truncate(path, 4096 * 5 + 100)
    with pytest.raises(IntegrityError):
        await migrate(_url(path))


async def test_a_file_that_was_made_and_never_written_is_a_new_database(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.touch()
    await migrate(_url(path))
    assert await current_revision(_url(path)) == head_revision()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    _mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount))
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


async def test_a_read_only_database_is_refused_and_left_alone(small_disk: Path) -> None:
    path = small_disk / "store.db"
    await migrate(_url(path), target="0001")
    before = _digest(path)
    _mount("-o", "remount,ro", str(small_disk))
    with pytest.raises(StorageError, match="Read-only") as told:
        await migrate(_url(path))
    assert told.value.exit_code == 5
    assert _digest(path) == before


async def test_a_full_disk_is_told_and_leaves_the_old_schema(small_disk: Path) -> None:
    path = small_disk / "store.db"
    await migrate(_url(path), target="0001")
    (small_disk / "ballast").write_bytes(b"x" * _free(small_disk))
    with pytest.raises(StorageError):
        await migrate(_url(path))
    (small_disk / "ballast").unlink()
    assert await current_revision(_url(path)) == "0001"
    await migrate(_url(path))


async def test_a_full_disk_while_running_is_told_and_is_over_when_there_is_room(
    small_disk: Path,
) -> None:
    path = small_disk / "store.db"
    async with open_database(_url(path)) as database:
        ballast = small_disk / "ballast"
        ballast.write_bytes(b"x" * _free(small_disk))

        async def write(name: str) -> None:
            async with database.writing() as session:
                row = Token(
                    id=uuid.uuid4(),
                    name=name,
                    role="r" * 50,
                    digest=name,
                    created_ns=1,
                    expires_ns=2,
                )
                row.created_by = "x" * 200_000
                session.add(row)

        with pytest.raises(StorageError, match="disk"):
            await write("a")
        ballast.unlink()
        await write("b")
        async with database.reading() as session:
            assert (await session.scalars(select(Token.name))).all() == ["b"]


@pytest.mark.parametrize("round_", range(4))
async def test_a_migration_that_is_killed_happens_whole_or_not(tmp_path: Path, round_: int) -> None:
    path = tmp_path / "store.db"
    if round_ % 2:
        await migrate(_url(path), target="0001")
    code = (
        "import asyncio, sys; from appliance.config_server.store.migration import migrate;"
        "print('up', flush=True); asyncio.run(migrate(sys.argv[1]))"
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, _url(path), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    await child.stdout.readline()
    await asyncio.sleep(0.03 + 0.04 * round_)
    child.kill()
    await child.wait()
    found = await current_revision(_url(path))
    assert found in ({"0001", head_revision()} if round_ % 2 else {None, head_revision()})
    await migrate(_url(path))
    assert await current_revision(_url(path)) == head_revision()


async def test_who_waits_too_long_for_the_lock_is_told(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate(database_url)
    monkeypatch.setattr(migration, "LOCK_SECONDS_MAX", 1.0)
    entered, leave = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        if database_url.startswith("sqlite"):
            path = database_url.removeprefix("sqlite+aiosqlite:///")
            async with migration._file_lock(f"{path}.lock"):
                entered.set()
                await leave.wait()
            return
        engine = make_engine(database_url)
        async with engine.begin() as connection:
            await migration._advisory_lock(connection)
            entered.set()
            await leave.wait()
        await engine.dispose()

    holding = asyncio.create_task(hold())
    await entered.wait()
    started = time.monotonic()
    with pytest.raises(UnavailableError):
        await migrate(database_url)
    assert time.monotonic() - started < 10
    leave.set()
    await holding
    await migrate(database_url)


async def _empty(url: str) -> None:
    """The folder of an SQLite database, which is otherwise made by the migration."""
    if url.startswith("sqlite"):
        os.makedirs(os.path.dirname(url.removeprefix("sqlite+aiosqlite:///")), exist_ok=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
