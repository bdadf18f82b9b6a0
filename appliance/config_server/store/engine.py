"""The database, open and of the present schema.

Writers on SQLite begin with BEGIN IMMEDIATE: the second one waits at its beginning, and never
finds at its end that what it read has changed. On PostgreSQL each statement sees what is committed;
a row that two may change carries a revision.

Each block is one transaction: committed at its end, rolled back when anything is raised in it.

Source: docs/CONTROL.md §2; sqlite.org/lang_transaction.html, sqlite.org/wal.html.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeVarTuple

from sqlalchemy import Row, Select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from appliance.config_server.store.connection import (
    CONNECTIONS_DEFAULT,
    IMMEDIATE,
    make_engine,
)
from appliance.config_server.store.migration import migrate
from appliance.config_server.store.trouble import explained
from replication.errors import UnavailableError

WRITE_WAIT_SECONDS_MAX = 30.0
LOOKUP_CONNECTIONS = 4

Columns = TypeVarTuple("Columns")


class Database:
    """An open database.

    sessions: for who must hold a session beyond a block; they write.
    """

    def __init__(self, engine: AsyncEngine, lookups: AsyncEngine | None = None) -> None:
        self.engine = engine
        self._lookups = lookups or engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        writing = engine.execution_options(**{IMMEDIATE: True})
        self.sessions = async_sessionmaker(writing, expire_on_commit=False)
        self._reading = async_sessionmaker(engine, expire_on_commit=False)
        self._turn = asyncio.Semaphore(1)

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """A transaction that only reads; what is changed in it is thrown away."""
        with explained():
            async with self._reading() as session:
                yield session

    async def look_up(
        self, statement: Select[*Columns], **parameters: object
    ) -> Row[*Columns] | None:
        """The first row of some columns: what each request needs, at half a session's cost.

        statement: made once, with a ``bindparam`` for each of ``parameters``.
        """
        with explained():
            async with self._lookups.connect() as connection:
                return (await connection.execute(statement, parameters)).first()

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        """A transaction that may write. Never open one inside another: it would wait for itself.

        Raises UnavailableError when its turn does not come.
        """
        with explained():
            async with self._in_turn(), self.sessions.begin() as session:
                yield session

    @contextlib.asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        """SQLite has one writer; those of this process wait for each other here, in order."""
        if not self.is_sqlite:
            yield
            return
        try:
            async with asyncio.timeout(WRITE_WAIT_SECONDS_MAX):
                await self._turn.acquire()
        except TimeoutError as error:
            raise UnavailableError(
                f"the database was written to by others for {WRITE_WAIT_SECONDS_MAX:.0f} s",
                hint="try again",
            ) from error
        try:
            yield
        finally:
            self._turn.release()


@contextlib.asynccontextmanager
async def open_database(
    url: str, *, connections_max: int = CONNECTIONS_DEFAULT
) -> AsyncIterator[Database]:
    """Bring the database at ``url`` to the present schema and open it.

    Raises ConfigError for one that is newer than this program or of something else, IntegrityError
    for a damaged one, StorageError for one that cannot be written, UnavailableError when its server
    does not answer. None of them has written anything.
    """
    await migrate(url)
    engine = make_engine(url, connections_max=connections_max)
    lookups = make_engine(url, connections_max=LOOKUP_CONNECTIONS, looking_up=True)
    try:
        yield Database(engine, lookups)
    finally:
        await lookups.dispose()
        await engine.dispose()
