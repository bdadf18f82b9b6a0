"""Scripts on the config server's own host: a process group each, which never outlives its action.

The program leads a session of its own. It is left unreaped until its group has been killed, so
that the group's number cannot be another's by then. What it writes is read as it comes; its end is
kept. When this daemon is killed, so is the program: else the next attempt would run beside it.

Source: setsid(2), pidfd_open(2), memfd_create(2), PR_SET_PDEATHSIG in prctl(2), setpriv(1).
"""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence

from appliance.config_server.recovery.actions.tail import Tail

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/",
}
"""All of it: what this daemon has in its own may be secret."""

READ_BYTES = 64 << 10
READS_AT_ONCE = 16
SHELL = "/bin/sh"
_DIES_WITH_US = ("/usr/bin/setpriv", "--pdeathsig", "KILL", "--")
"""In front of a program; it becomes that program."""


async def run_local(words: Sequence[str], *, stdin: bytes, folder: str, output: Tail) -> int:
    """Run a program and return its exit code, negative for a signal.

    Whoever cancels this has no process of it left. Raises OSError when it cannot be started.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        given = os.memfd_create("context", os.MFD_CLOEXEC)
        try:
            os.write(given, stdin)
            os.lseek(given, 0, os.SEEK_SET)
            process = subprocess.Popen(  # noqa: ASYNC220 - it forks; nothing waits here
                (*_DIES_WITH_US, *words),
                stdin=given,
                stdout=writing,
                stderr=writing,
                cwd=folder,
                env=ENVIRONMENT,
                start_new_session=True,
            )
        finally:
            os.close(given)
            os.close(writing)
        try:
            await _until_it_ends(process, reading, output)
        finally:
            _end(process)
        _drain(reading, output)
        return process.returncode
    finally:
        os.close(reading)


async def _until_it_ends(process: "subprocess.Popen[bytes]", reading: int, output: Tail) -> None:
    """Read what it writes until it ends, whoever else holds the pipe."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    os.set_blocking(reading, False)
    watched = os.pidfd_open(process.pid)

    def read() -> None:
        try:
            part = os.read(reading, READ_BYTES)
        except BlockingIOError:
            return
        output.take(part)
        if not part:
            loop.remove_reader(reading)

    def end() -> None:
        loop.remove_reader(watched)
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(reading, read)
    loop.add_reader(watched, end)
    try:
        await ended
    finally:
        loop.remove_reader(reading)
        loop.remove_reader(watched)
        os.close(watched)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill all of its group, then let the system forget it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _drain(reading: int, output: Tail) -> None:
    """What the pipe still holds; who escaped from the group and goes on writing is not read on."""
    for _ in range(READS_AT_ONCE):
        try:
            part = os.read(reading, READ_BYTES)
        except BlockingIOError:
            return
        if not part:
            return
        output.take(part)
