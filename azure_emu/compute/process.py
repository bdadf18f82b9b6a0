"""Processes that outlive the daemon, found again by an argument that only they have.

The table of processes is the truth: nothing that is written down can be older than what runs. A
process id that was given out again does not carry the argument.
"""

import asyncio
import contextlib
import os
import signal

END_SECONDS_MAX = 10.0


def find_processes(argument: str) -> list[int]:
    """Ids of processes of which one argument is exactly this one."""
    wanted = b"\0" + os.fsencode(argument) + b"\0"
    return [
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdecimal() and wanted in _command_line(entry)
    ]


def has_argument(process: int, argument: str) -> bool:
    """Whether the process is alive and still the one that was meant."""
    return b"\0" + os.fsencode(argument) + b"\0" in _command_line(str(process))


async def ended(process: int) -> None:
    """Wait until the process is gone, whoever its parent is."""
    try:
        fd = os.pidfd_open(process)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(fd, done.set)
    try:
        await done.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


async def kill(process: int) -> None:
    """Have the process end at once; it is gone on return, unless the kernel holds it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_SECONDS_MAX):
            await ended(process)


def _command_line(entry: str) -> bytes:
    try:
        with open(f"/proc/{entry}/cmdline", "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
