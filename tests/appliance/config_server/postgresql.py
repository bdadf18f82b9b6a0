"""PostgreSQL as Debian packages it, on a private socket, for one test session; a database a test.

Started by root it runs as user postgres, and it ends with this process, however that ends.
"""

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg

USER = "postgres"
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0


@dataclass(frozen=True, slots=True)
class PostgreSQL:
    """A running server; ``folder`` has its socket and its data."""

    folder: str
    process: "subprocess.Popen[bytes]"

    def connect(self) -> "psycopg.Connection[tuple[object, ...]]":
        """As its administrator."""
        return psycopg.connect(host=self.folder, user=USER, dbname=USER, autocommit=True)

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a database that is empty now and gone later."""
        name = f"understudy_{uuid.uuid4().hex}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        try:
            yield f"postgresql+psycopg://{USER}@/{name}?host={self.folder}"
        finally:
            with self.connect() as connection:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextlib.contextmanager
def run_postgresql() -> Iterator[PostgreSQL]:
    """A server with an empty cluster, in a folder of its own below the system's one for such."""
    # Not below pytest's folder: user postgres may not enter it, and sockets' paths are short.
    folder = tempfile.mkdtemp(prefix="understudy-postgresql-")
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, USER, USER)
        data = f"{folder}/data"
        _run("initdb", "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync", "-D", data)
        log = open(f"{folder}/log", "wb")  # noqa: SIM115 - the server's as long as it runs
        with log:
            process = subprocess.Popen(
                _command(
                    "postgres",
                    "-D",
                    data,
                    *_options(
                        listen_addresses="",
                        unix_socket_directories=folder,
                        fsync="off",
                        shared_buffers="32MB",
                        max_connections="100",
                        dynamic_shared_memory_type="mmap",
                    ),
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            server = PostgreSQL(folder, process)
            _await(server)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGQUIT)
                process.wait(STOP_SECONDS_MAX)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _await(server: PostgreSQL) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            server.connect().close()
        except psycopg.OperationalError:
            assert server.process.poll() is None, "PostgreSQL ended at its start"
            assert time.monotonic() < deadline, "PostgreSQL does not come up"
            time.sleep(0.05)
        else:
            return


def _options(**settings: str) -> list[str]:
    return [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]


def _run(program: str, *arguments: str) -> None:
    subprocess.run(_command(program, *arguments), check=True, capture_output=True, cwd="/")


def _command(program: str, *arguments: str) -> list[str]:
    found = glob.glob(f"/usr/lib/postgresql/*/bin/{program}")
    assert found, "PostgreSQL is not installed: make setup"
    newest = max(found, key=lambda path: int(path.split("/")[4]))
    command = ["setpriv", "--pdeathsig", "QUIT"]
    if os.geteuid() == 0:
        command += ["--reuid", USER, "--regid", USER, "--init-groups"]
    return [*command, "--", newest, *arguments]
