"""Scripts on the config server's own host, of which nothing outlives the action.

The program leads a session of its own below a supervisor, which ends as it does, once all is gone
that it has begun. What it writes is read as it comes; its end is kept. When this daemon is killed,
so is all of it: else the next attempt would run beside it.

Source: pidfd_open(2), memfd_create(2); supervise.py.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence

from appliance.config_server.recovery.actions.supervise import SWEEP_SECONDS_MAX, command_of
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
END_SECONDS_MAX = SWEEP_SECONDS_MAX + 5.0
"""So long a supervisor may take to end all that there is."""


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
                command_of(words),
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
        await _until_it_ends(process, reading, output)
        process.wait()
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
        await asyncio.shield(ended)
    except asyncio.CancelledError:
        process.send_signal(signal.SIGTERM)
        await _until_done(ended)
        process.kill()
        process.wait()
        raise
    finally:
        loop.remove_reader(reading)
        loop.remove_reader(watched)
        os.close(watched)


async def _until_done(ended: "asyncio.Future[None]") -> None:
    """For END_SECONDS_MAX at most, whoever else cancels meanwhile."""
    deadline = time.monotonic() + END_SECONDS_MAX
    while not ended.done() and (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({ended}, timeout=left)


def _drain(reading: int, output: Tail) -> None:
    """What the pipe still holds; who escaped and goes on writing is not read on."""
    for _ in range(READS_AT_ONCE):
        try:
            part = os.read(reading, READ_BYTES)
        except BlockingIOError:
            return
        if not part:
            return
        output.take(part)
