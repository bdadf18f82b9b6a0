"""QEMU's monitor: a connection to one VM's process, by the QEMU Machine Protocol.

The socket lies in the VM's folder, whose path may be longer than a socket's name can be: it is
reached through the folder's descriptor. One client at a time is heard; one that has died is not
in the way of the next.

Source: QEMU QMP Reference Manual.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qemu.qmp import QMPClient, QMPError

from azure_emu.compute.tool import WORDS_MAX
from replication.errors import UnavailableError

SOCKET = "qmp.sock"
POINT_SETS = 32
"""A disk's number and this is the number of the set of descriptors that has its point's file."""

SCREEN_SET = 1
CALL_SECONDS_MAX = 30.0
_STREAM = "stream-"


@dataclass(frozen=True, slots=True)
class StreamJob:
    """A disk's copy.

    node:  the disk that it goes into.
    state: as QEMU names it; ``pending``: all is copied and the disk still has its backing file;
           ``concluded``: it has ended, and waits to be dismissed.
    error: why it ended; empty: all went well so far.
    """

    name: str
    node: str
    state: str
    done_bytes: int
    total_bytes: int
    error: str


class Monitor:
    """Made by `connect`; every call raises UnavailableError when the VM's process is gone."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    @classmethod
    async def connect(cls, folder: str) -> "Monitor":
        client = QMPClient("understudy-compute")
        client.logger.disabled = True  # what it tells of is raised here
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                async with asyncio.timeout(CALL_SECONDS_MAX):
                    await client.connect(f"/proc/self/fd/{fd}/{SOCKET}")
            finally:
                os.close(fd)
        except (QMPError, OSError, TimeoutError, EOFError) as error:
            raise UnavailableError(f"no answer from QEMU in {folder}: {error}") from error
        return cls(client)

    async def close(self) -> None:
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()

    async def status(self) -> str:
        """Of the CPUs: ``running``, ``io-error``, ``internal-error``, ``shutdown``, …"""
        answer = await self._ask("query-status")
        with _readable("query-status"):
            return str(answer["status"])

    async def disk_is_full(self) -> bool:
        """Whether the CPUs were stopped by a lack of room for a write, and by nothing else."""
        blocks = await self._ask("query-block")
        with _readable("query-block"):
            states = {block.get("io-status", "ok") for block in blocks} - {"ok"}
            return states == {"nospace"}

    async def resume(self) -> None:
        await self._ask("cont")

    async def press_power_button(self) -> None:
        await self._ask("system_powerdown")

    async def quit(self) -> None:
        """Flush and end; the process is gone some time later."""
        with contextlib.suppress(UnavailableError):
            await self._ask("quit")

    async def screenshot(self, path: str) -> None:
        """Write what the screen shows as PNG. QEMU may open no file: it is given this one."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
        chosen: dict[str, object] = {"fdset-id": SCREEN_SET}
        try:
            self._client.send_fd_scm(fd)
            await self._ask("add-fd", chosen)
        except (QMPError, OSError) as error:
            raise UnavailableError(f"QEMU takes no file: {error}") from error
        finally:
            os.close(fd)
        try:
            file = f"/dev/fdset/{SCREEN_SET}"
            await self._ask("screendump", {"filename": file, "format": "png"})
        finally:
            await self._ask("remove-fd", chosen)

    async def start_stream(self, node: str) -> None:
        """Begin to copy into ``node`` what is only below it. The job waits before it lets go of the
        backing file, and again after that.
        """
        waits = {"auto-finalize": False, "auto-dismiss": False}
        await self._ask("block-stream", {"job-id": _STREAM + node, "device": node, **waits})

    async def streams(self) -> list[StreamJob]:
        jobs = await self._ask("query-jobs")
        with _readable("query-jobs"):
            return [
                StreamJob(
                    name=str(job["id"]),
                    node=str(job["id"]).removeprefix(_STREAM),
                    state=str(job["status"]),
                    done_bytes=int(job["current-progress"]),
                    total_bytes=int(job["total-progress"]),
                    error=str(job.get("error", "")),
                )
                for job in jobs
                if job["type"] == "stream"
            ]

    async def finalize(self, job: StreamJob) -> None:
        """Have a pending copy let go of the backing file: the header of the image says so at once.

        QEMU does not write the tables that are dirty in its memory before it: `flush` does.
        """
        await self._ask("job-finalize", {"id": job.name})

    async def dismiss(self, job: StreamJob) -> None:
        """Forget a copy that has concluded; the point's file is closed, if nothing needs it."""
        await self._ask("job-dismiss", {"id": job.name})
        number = job.node.removeprefix("disk")
        if not job.error and number.isdecimal():
            with contextlib.suppress(UnavailableError):  # it was closed with another connection
                await self._ask("remove-fd", {"fdset-id": POINT_SETS + int(number)})

    async def flush(self, node: str) -> None:
        """Have all that QEMU holds of a disk, tables too, written and synced. It does not tell when
        a write fails.
        """
        told: dict[str, object] = {"command-line": f"qemu-io {node} flush"}
        said = str(await self._ask("human-monitor-command", told)).strip()
        if said:
            raise UnavailableError(f"QEMU does not flush {node}: {said[:WORDS_MAX]}")

    async def _ask(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        try:
            async with asyncio.timeout(CALL_SECONDS_MAX):
                return await self._client.execute(command, arguments)
        except (QMPError, OSError, TimeoutError, EOFError) as error:
            told = str(error) or type(error).__name__
            raise UnavailableError(f"QEMU does not do {command}: {told}") from error


@contextlib.contextmanager
def _readable(command: str) -> Iterator[None]:
    """An answer that is none is that of a VM that broke out, and its trouble alone."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnavailableError(f"QEMU's answer to {command} cannot be read") from error
