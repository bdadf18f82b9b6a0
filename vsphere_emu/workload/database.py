"""PostgreSQL on a guest's disks, reached through a UNIX socket only.

The data folder is whole or not there: it is made under another name, filled, stopped, synced, and
renamed. Started by root, the server runs as user postgres, with the right to pass folders that
this user may not enter (CAP_DAC_READ_SEARCH): a guest's mounts lie wherever the lab has its root.
"""

import contextlib
import functools
import glob
import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from daemon.durable import storage_error, sync_folder
from replication.errors import ConfigError, IntegrityError, UnavailableError
from vsphere_emu.processes import has_ended_unreaped
from vsphere_emu.tool import run_tool, tail, try_tool
from vsphere_emu.workload import life

START_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 20.0
REAPED_SECONDS_MAX = 10.0
POLL_SECONDS = 0.05
STRAY_STEPS = ((signal.SIGQUIT, 10.0), (signal.SIGKILL, 5.0))
WAL_MEGABYTES_MIN, WAL_MEGABYTES_MAX = 64, 1024
USER = "postgres"

_SUMS = """SELECT (SELECT coalesce(sum(abalance), 0) FROM pgbench_accounts),
 (SELECT coalesce(sum(tbalance), 0) FROM pgbench_tellers),
 (SELECT coalesce(sum(bbalance), 0) FROM pgbench_branches),
 (SELECT coalesce(sum(delta), 0) FROM pgbench_history),
 (SELECT count(*) FROM pgbench_history)"""


@dataclass(frozen=True, slots=True)
class BalanceSums:
    """pgbench's sums in one snapshot: each transaction adds the same amount to all four."""

    accounts: int
    tellers: int
    branches: int
    history: int
    transactions: int


class Database:
    """A server over ``<data_mount>/postgresql``, its write-ahead log in ``<wal_mount>/wal``.

    log: the descriptor that takes what the server says; standard error if not given.
    """

    def __init__(self, data_mount: str, wal_mount: str, *, log: int = 2) -> None:
        self.folder = os.path.join(data_mount, "postgresql")
        self.wal_folder = os.path.join(wal_mount, "wal")
        self.socket_folder = socket_folder(data_mount)
        self._mounts = (data_mount, wal_mount)
        self._log = log
        self._binaries = find_binaries()
        self._server: subprocess.Popen[bytes] | None = None

    def make(self, scale: int) -> None:
        """Create the database with pgbench's tables; fine if it is there."""
        if os.path.isdir(self.folder):
            return
        pending = f"{self.folder}.new"
        for half_made in (pending, self.wal_folder):
            shutil.rmtree(half_made, ignore_errors=True)
            os.mkdir(half_made, 0o700)
            _give(half_made)
        options = [
            "-U",
            USER,
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-locale",
            "--data-checksums",
            "--no-sync",
        ]
        run_tool(*self._command("initdb", *options, "-X", self.wal_folder, "-D", pending))
        final, self.folder = self.folder, pending
        try:
            self.start(fsync="off")  # a crash now leaves what the next run throws away
            run_tool(*self.client("pgbench", "-i", "-q", "-s", str(scale), USER))
            self.stop()
        finally:
            self.kill()
            self.folder = final
        for mount in self._mounts:
            run_tool("sync", "--file-system", mount)
        os.rename(pending, final)
        sync_folder(os.path.dirname(final))

    def start(self, *, fsync: Literal["on", "off"] = "on") -> None:
        """Start the server; return when it takes connections, after its recovery.

        Raises UnavailableError when it ends instead.
        """
        self._await_reaped()
        _make_socket_folder(self.socket_folder)
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": self.socket_folder,
            "dynamic_shared_memory_type": "mmap",  # within the data folder: nothing else to clean
            "shared_buffers": "64MB",
            "max_wal_size": f"{self._wal_megabytes()}MB",
            "checkpoint_timeout": "60s",
            "fsync": fsync,
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        self._server = subprocess.Popen(
            self._command("postgres", "-D", self.folder, *options, death_signal="QUIT"),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_SECONDS_MAX
        while try_tool(*self.client("pg_isready", "-q", "-d", USER)).returncode != 0:
            if self._server.poll() is not None:
                raise UnavailableError(
                    f"PostgreSQL ended at its start with exit code {self._server.returncode}",
                    hint="what it said last tells why",
                )
            if time.monotonic() > deadline:
                self.kill()
                raise UnavailableError(f"PostgreSQL not up after {START_SECONDS_MAX:.0f} s")
            time.sleep(POLL_SECONDS)

    def _await_reaped(self) -> None:
        """Of a server whose power was cut just now the number may still be in the table of
        processes, and PostgreSQL would take it for one that lives.
        """
        try:
            with open(os.path.join(self.folder, "postmaster.pid"), encoding="ascii") as file:
                pid = int(file.readline())
        except (OSError, ValueError):
            return
        deadline = time.monotonic() + REAPED_SECONDS_MAX
        while has_ended_unreaped(pid) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether the server that was started here runs."""
        return self._server is not None and self._server.poll() is None

    def stop(self) -> None:
        """A fast shutdown: sessions end, a checkpoint is written."""
        server = self._server
        if server is not None and server.poll() is None:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired as error:
                self.kill()
                raise UnavailableError("PostgreSQL did not stop, it was killed") from error
        self._forget()

    def kill(self) -> None:
        """End the server as a crash would; the next start recovers from its log."""
        server = self._server
        if server is not None and server.poll() is None:
            server.send_signal(signal.SIGQUIT)  # the postmaster takes its children along
            try:
                server.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        self._forget()

    def client(self, program: str, *arguments: str) -> list[str]:
        """The command of a client program connected to this server."""
        return [f"{self._binaries}/{program}", "-h", self.socket_folder, "-U", USER, *arguments]

    def _command(self, program: str, *arguments: str, death_signal: str = "KILL") -> list[str]:
        command = ["setpriv", "--pdeathsig", death_signal]
        if os.geteuid() == 0:
            command += ["--reuid", USER, "--regid", USER, "--init-groups"]
            command += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
        return [*command, "--", f"{self._binaries}/{program}", *arguments]

    def _wal_megabytes(self) -> int:
        space = os.statvfs(self._mounts[1])
        quarter = space.f_blocks * space.f_frsize // (4 << 20)
        return max(WAL_MEGABYTES_MIN, min(WAL_MEGABYTES_MAX, quarter))

    def _forget(self) -> None:
        self._server = None
        shutil.rmtree(self.socket_folder, ignore_errors=True)


def pgbench_invariant(socket_folder: str) -> BalanceSums:
    """Read the sums from a running server. Raises IntegrityError when they differ."""
    program = f"{find_binaries()}/psql"
    done = try_tool(program, "-XAtq", "-F,", "-h", socket_folder, "-U", USER, "-c", _SUMS)
    if done.returncode != 0:
        raise IntegrityError(f"pgbench's tables cannot be read: {tail(done)}")
    sums = BalanceSums(*(int(field) for field in done.stdout.strip().split(",")))
    if not sums.accounts == sums.tellers == sums.branches == sums.history:
        raise IntegrityError(f"pgbench's balances do not agree: {sums}")
    return sums


def socket_folder(data_mount: str) -> str:
    """Where the server of that mount listens: short, as a socket's path has 107 bytes at most."""
    digest = hashlib.sha256(os.path.realpath(data_mount).encode()).hexdigest()
    return f"/tmp/understudy-{digest[:12]}"  # noqa: S108 - made with care: _make_socket_folder


def find_binaries() -> str:
    """The folder of the newest PostgreSQL's programs."""
    found = [
        (int(path.split("/")[-2]), path)
        for path in glob.glob("/usr/lib/postgresql/*/bin")
        if path.split("/")[-2].isdigit() and os.access(f"{path}/initdb", os.X_OK)
    ]
    if not found:
        raise ConfigError("PostgreSQL is not installed", hint="make setup")
    return max(found)[1]


def stop_stray(data_mount: str) -> None:
    """End a server whose workload is gone, found by its postmaster.pid; fine if there is none."""
    for folder in _folders(data_mount):
        if told := _pid_file(folder):
            pid = int(told[0])
            life.end_process(pid, functools.partial(_works_in, pid, folder), STRAY_STEPS)
    shutil.rmtree(socket_folder(data_mount), ignore_errors=True)


def server_of(data_mount: str) -> int | None:
    """The process id of the server that works on that mount; None if there is none."""
    for folder in _folders(data_mount):
        told = _pid_file(folder)
        if told and _works_in(int(told[0]), folder):
            return int(told[0])
    return None


def shared_memory_of(data_mount: str) -> list[str]:
    """System V segments of the server of that mount, which outlive it when it is killed.

    Source: the seventh line of postmaster.pid (miscadmin.h): key and id.
    """
    told = [_pid_file(folder) for folder in _folders(data_mount)]
    return [lines[6].split()[1] for lines in told if len(lines) > 6 and len(lines[6].split()) == 2]


def forget_server(data_mount: str, shared_memory: Sequence[str]) -> None:
    """Remove what a server that was killed has left outside of the mount."""
    for segment in shared_memory:
        try_tool("ipcrm", "--shmem-id", segment)  # gone already is fine
    shutil.rmtree(socket_folder(data_mount), ignore_errors=True)


def _folders(data_mount: str) -> tuple[str, ...]:
    return tuple(os.path.join(data_mount, name) for name in ("postgresql", "postgresql.new"))


def _pid_file(folder: str) -> list[str]:
    """The lines of postmaster.pid; none where no server is, or it ended in good order."""
    try:
        with open(os.path.join(folder, "postmaster.pid")) as file:
            lines = file.read().splitlines()
    except (OSError, ValueError):
        return []
    return lines if lines and lines[0].isdecimal() else []


def _works_in(pid: int, folder: str) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/cwd", folder)
    except OSError:
        return False


def _make_socket_folder(path: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not os.path.isdir(path) or os.path.islink(path) or found.st_uid not in _owners():
        raise ConfigError(f"{path} is somebody else's", hint="remove it")
    _give(path)


def _give(path: str) -> None:
    if os.geteuid() == 0:
        try:
            shutil.chown(path, USER, USER)
        except OSError as error:
            raise storage_error("give to user postgres", path, error) from error


def _owners() -> set[int]:
    return {os.geteuid(), pwd.getpwnam(USER).pw_uid}
