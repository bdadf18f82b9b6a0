"""Connections to the database, with the settings that all of the program relies upon."""

import os
from functools import partial
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

BUSY_MILLISECONDS = 20_000
CONNECTIONS_DEFAULT = 8
CONNECT_SECONDS_MAX = 10
POOL_SECONDS_MAX = 30
IMMEDIATE = "understudy_immediate"
"""The execution option of connections that write."""


def make_engine(
    url: str,
    *,
    connections_max: int = CONNECTIONS_DEFAULT,
    migrating: bool = False,
    looking_up: bool = False,
) -> AsyncEngine:
    """An engine for ``url``; nothing is opened yet.

    migrating: tables are made anew to change them, and their children must not go with them.
    looking_up: for single statements that only read, each by itself: no BEGIN, no ROLLBACK.
    """
    parsed = make_url(url)
    options: dict[str, Any] = {
        "pool_size": connections_max,
        "max_overflow": 0,
        "pool_timeout": POOL_SECONDS_MAX,
    }
    if looking_up:
        options |= {"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None}
    if parsed.get_backend_name() == "sqlite":
        engine = create_async_engine(parsed, **options)
        foreign_keys = "OFF" if migrating else "ON"
        event.listen(engine.sync_engine, "connect", partial(_prepare_sqlite, foreign_keys))
        if not looking_up:
            event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine
    return create_async_engine(
        parsed,
        pool_pre_ping=True,
        connect_args={"connect_timeout": CONNECT_SECONDS_MAX, "application_name": "understudy"},
        **options,
    )


def _prepare_sqlite(foreign_keys: str, connection: DBAPIConnection, _: object) -> None:
    # We say BEGIN ourselves; left to the driver, reads would run outside of transactions.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {BUSY_MILLISECONDS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        f"foreign_keys = {foreign_keys}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get(IMMEDIATE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def sqlite_path(url: str) -> str | None:
    """The file of an SQLite database, none for another kind."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return None
    assert parsed.database
    return os.path.abspath(parsed.database)
