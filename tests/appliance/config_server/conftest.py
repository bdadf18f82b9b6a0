"""What tests of the config server share: databases of both kinds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.appliance.config_server.postgresql import PostgreSQL, run_postgresql


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A running PostgreSQL: ``with postgresql.database() as url``."""
    with run_postgresql() as server:
        yield server


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "SQLite":
        yield f"sqlite+aiosqlite:///{tmp_path}/state/store.db"
        return
    server: PostgreSQL = request.getfixturevalue("postgresql")
    with server.database() as url:
        yield url
