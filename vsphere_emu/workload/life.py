"""A workload's life as others see it: running or not, ready or not, told by a lock.

The workload holds a POSIX lock on its file while it lives. The kernel tells who holds it, so a
process id is never stale nor another's, and nothing is left to clean after SIGKILL.
"""

import contextlib
import errno
import fcntl
import os
import select
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

from daemon.durable import make_folder, storage_error
from replication.errors import ConfigError, StorageError, UnavailableError

READY_SECONDS_MAX = 180.0
STOP_SECONDS_MAX = 30.0
KILL_SECONDS_MAX = 5.0
POLL_SECONDS = 0.05
LOG_BYTES_SHOWN = 2000
READY = b"ready\n"
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid


def holder(lock_path: str) -> int | None:
    """The process id of the workload that lives, None if there is none."""
    try:
        fd = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    finally:
        os.close(fd)
    return int(pid) if kind != fcntl.F_UNLCK else None


@contextlib.contextmanager
def held(lock_path: str) -> Iterator[int]:
    """Hold the lock while the context is open; yields the descriptor for ``tell_ready``.

    Raises ConfigError when the workload runs already.
    """
    fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise storage_error("lock", lock_path, error) from error
            raise ConfigError(f"the workload of {lock_path} runs already") from error
        os.ftruncate(fd, 0)
        yield fd
    finally:
        os.close(fd)


def tell_ready(fd: int) -> None:
    """Say that the workload is at work."""
    os.pwrite(fd, READY, 0)


def start(command: Sequence[str], lock_path: str, log_path: str) -> int:
    """Start a workload and return its process id once it is at work.

    Raises UnavailableError with the end of its log when it ends instead.
    """
    if (pid := holder(lock_path)) is not None:
        return pid
    make_folder(os.path.dirname(lock_path))
    with open(log_path, "ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    deadline = time.monotonic() + READY_SECONDS_MAX
    while not (holder(lock_path) == child.pid and _is_ready(lock_path)):
        if child.poll() is not None:
            raise UnavailableError(
                f"the workload ended at its start with exit code {child.returncode}: "
                f"{log_tail(log_path)}"
            )
        if time.monotonic() > deadline:
            child.terminate()
            raise UnavailableError(
                f"the workload was not at work after {READY_SECONDS_MAX:.0f} s: "
                f"{log_tail(log_path)}"
            )
        time.sleep(POLL_SECONDS)
    child.returncode = 0  # it outlives us: no warning that it was not waited for
    return child.pid


def stop(lock_path: str) -> None:
    """SIGTERM, and SIGKILL after STOP_SECONDS_MAX; fine if the workload does not run."""
    pid = holder(lock_path)
    if pid is not None:
        steps = ((signal.SIGTERM, STOP_SECONDS_MAX), (signal.SIGKILL, KILL_SECONDS_MAX))
        end_process(pid, lambda: holder(lock_path) == pid, steps)


def end_process(
    pid: int, is_meant: Callable[[], bool], steps: Sequence[tuple[signal.Signals, float]]
) -> None:
    """Send each signal and wait its seconds for the end; return when the process has ended.

    is_meant: whether ``pid`` is the process that is meant, asked when it can no longer be
    replaced by another. Raises StorageError when no signal ends it.
    """
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not is_meant():
            return
        ended = select.poll()
        ended.register(process, select.POLLIN)
        for number, seconds in steps:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, number)
            if ended.poll(seconds * 1000):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)  # where it is our own child
                return
    finally:
        os.close(process)
    raise StorageError(
        f"process {pid} does not end, even by SIGKILL",
        hint="its file system may be frozen: fsfreeze --unfreeze the mount point",
    )


def log_tail(log_path: str) -> str:
    """The end of a workload's log."""
    with open(log_path, "rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_BYTES_SHOWN))
        return log.read().decode(errors="replace").strip()


def _is_ready(lock_path: str) -> bool:
    with open(lock_path, "rb") as file:
        return file.read() == READY
