"""Bringing a database to the present schema, under a lock, in one transaction.

A process that is killed within leaves the old schema whole. Whatever is not ours, newer or damaged
is refused before anything is written. Alembic is loaded where there is something to migrate: most
starts find the present schema, and are a third of a second faster without.

Source: docs/CONTROL.md §2; alembic.sqlalchemy.org; sqlite.org/pragma.html#pragma_quick_check.
"""

import asyncio
import contextlib
import fcntl
import os
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator

from sqlalchemy import Connection, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection

from appliance.config_server.store.connection import IMMEDIATE, make_engine, sqlite_path
from appliance.config_server.store.trouble import explained
from daemon.durable import make_folder, storage_error
from replication.errors import ConfigError, IntegrityError, StorageError, UnavailableError

LOCK_SECONDS_MAX = 60.0
LOCK_POLL_SECONDS = 0.1
ADVISORY_LOCK = 0x756E6465727374
"""PostgreSQL's number for our lock: the letters "underst"."""

VERSION_TABLE = "alembic_version"
_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
_VERSION = f"SELECT version_num FROM {VERSION_TABLE}"  # noqa: S608 - a name of ours
_PRIMARY_CODE = 0xFF
_REVISION_FILE = re.compile(r"v([0-9]{4})_[a-z0-9_]+\.py")
_SCRIPTS = os.path.join(os.path.dirname(__file__), "migrations")


async def migrate(url: str, *, target: str = "head") -> None:
    """Bring the database at ``url`` to ``target``, from wherever it is.

    Raises as ``open_database`` does.
    """
    path = sqlite_path(url)
    if path is not None:
        make_folder(os.path.dirname(path))
        async with _file_lock(f"{path}.lock"):
            await asyncio.to_thread(_examine_file, path)
            await _upgrade(url, target)
        return
    await _upgrade(url, target)


async def current_revision(url: str) -> str | None:
    """Which schema the database has; none when it has none of ours. Nothing is written."""
    path = sqlite_path(url)
    if path is not None and not await asyncio.to_thread(os.path.exists, path):
        return None
    engine = make_engine(url)
    try:
        with explained():
            async with engine.connect() as connection:
                return await connection.run_sync(_revision_of)
    finally:
        await engine.dispose()


def head_revision() -> str:
    """The schema of this program."""
    return max(_revisions())


def _revisions() -> set[str]:
    """The schemas that this program knows, by the names of its migrations' files."""
    names = os.listdir(os.path.join(_SCRIPTS, "versions"))
    return {found[1] for name in names if (found := _REVISION_FILE.fullmatch(name))}


def _revision_of(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    revision: str | None = connection.execute(text(_VERSION)).scalar_one_or_none()
    return revision


async def _upgrade(url: str, target: str) -> None:
    engine = make_engine(url, migrating=True)
    try:
        with explained():
            writing = engine.execution_options(**{IMMEDIATE: True})
            async with writing.begin() as connection:
                if engine.dialect.name != "sqlite":
                    await _advisory_lock(connection)
                await connection.run_sync(_step, target)
    finally:
        await engine.dispose()


def _step(connection: Connection, target: str) -> None:
    """Look at what is there, then migrate; all in the caller's transaction."""
    if connection.dialect.name != "sqlite":  # of a file this was decided before it was opened
        tables = set(inspect(connection).get_table_names())
        _refuse_others(tables, _revision_of(connection))
    wanted = head_revision() if target == "head" else target
    if _revision_of(connection) != wanted:
        _upgrade_within(connection, wanted)
    if connection.dialect.name == "sqlite":
        broken = connection.execute(text("PRAGMA foreign_key_check")).all()
        if broken:
            raise IntegrityError(
                f"{len(broken)} rows of the database refer to rows that are not there",
                hint="restore the database from a backup; it was not written to",
            )


def _upgrade_within(connection: Connection, revision: str) -> None:
    from alembic import command  # noqa: PLC0415 - see above
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", _SCRIPTS)
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _refuse_others(tables: set[str], revision: str | None) -> None:
    """Refuse a database that is not ours, or of a program newer than this one."""
    if revision is None and tables - {VERSION_TABLE}:
        raise ConfigError(
            f"the database holds tables of something else: {', '.join(sorted(tables)[:5])}",
            hint="give the config server a database of its own",
        )
    if revision is not None and revision not in _revisions():
        raise ConfigError(
            f"the database has schema {revision}; this program knows up to {head_revision()}",
            hint="start the newer program again, or restore the backup of before the upgrade",
        )


def _examine_file(path: str) -> None:
    """Refuse a file that is damaged, not ours or no database, without a write to it."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error("look at", path, error) from error
    if size == 0:
        return  # made, and killed before the first transaction
    if not os.access(path, os.W_OK):
        raise StorageError(
            f"the database {path} cannot be written to",
            hint="check owner, mode and mount options of the path",
        )
    try:
        with _opened_for_reading(path) as database:
            told = [row[0] for row in database.execute("PRAGMA quick_check(1)")]
            if told != ["ok"]:
                raise _damaged(path, str(told[0]))
            tables = {row[0] for row in database.execute(_TABLES)}
            versions = database.execute(_VERSION) if VERSION_TABLE in tables else ()
            revision = next((row[0] for row in versions), None)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & _PRIMARY_CODE in (
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_NOTADB,
        ):
            raise _damaged(path, str(error)) from error
        raise StorageError(
            f"the database {path} cannot be read: {error}",
            hint="is the disk full, or does the kernel log tell of I/O errors?",
        ) from error
    _refuse_others(tables, revision)


def _damaged(path: str, told: str) -> IntegrityError:
    return IntegrityError(
        f"the database {path} is damaged: {told}",
        hint="restore it from a backup; it was not written to",
    )


@contextlib.contextmanager
def _opened_for_reading(path: str) -> Iterator[sqlite3.Connection]:
    database = sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True, timeout=LOCK_SECONDS_MAX)
    try:
        yield database
    finally:
        database.close()


def _quoted(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


@contextlib.asynccontextmanager
async def _file_lock(path: str) -> AsyncIterator[None]:
    """One migration at a time over all processes of this host; the kernel frees it at any end."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise storage_error("open", path, error) from error
    try:
        deadline = time.monotonic() + LOCK_SECONDS_MAX
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        f"another process has migrated the database for {LOCK_SECONDS_MAX:.0f} s",
                        hint=f"find who holds {path}",
                    ) from error
            await asyncio.sleep(LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(fd)


async def _advisory_lock(connection: AsyncConnection) -> None:
    """The same over all clients of a PostgreSQL database, to the end of the transaction."""
    await connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_SECONDS_MAX:.0f}s'"))
    await connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))


def database_name(url: str) -> str:
    """How to call the database to people: no password in it."""
    return sqlite_path(url) or make_url(url).render_as_string(hide_password=True)
