"""QEMU's monitor: a connection to one VM's process, by the QEMU Machine Protocol.

The socket lies in the VM's folder, whose path may be longer than a socket's name can be: it is
reached through the folder's descriptor. One client at a time is heard; one that has died is not
in the way of the next.

Source: QEMU QMP Reference Manual.
"""

import asyncio
import contextlib
import os
from dataclasses import dataclass
from typing import Any

from qemu.qmp import QMPClient, QMPError

from replication.errors import UnavailableError

SOCKET = "qmp.sock"
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
        return str((await self._ask("query-status"))["status"])

    async def disk_is_full(self) -> bool:
        """Whether the CPUs were stopped by a lack of room for a write, and by nothing else."""
        blocks = await self._ask("query-block")
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
        """Write what the screen shows as PNG."""
        await self._ask("screendump", {"filename": path, "format": "png"})

    async def start_stream(self, node: str) -> None:
        """Begin to copy into ``node`` what is only below it. The job waits before it lets go of the
        backing file, and again after that.
        """
        waits = {"auto-finalize": False, "auto-dismiss": False}
        await self._ask("block-stream", {"job-id": _STREAM + node, "device": node, **waits})

    async def streams(self) -> list[StreamJob]:
        jobs = await self._ask("query-jobs")
        return [
            StreamJob(
                name=job["id"],
                node=job["id"].removeprefix(_STREAM),
                state=job["status"],
                done_bytes=job["current-progress"],
                total_bytes=job["total-progress"],
                error=job.get("error", ""),
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
        """Forget a copy that has concluded."""
        await self._ask("job-dismiss", {"id": job.name})

    async def flush(self, node: str) -> None:
        """Have all that QEMU holds of a disk, tables too, written and synced. It does not tell when
        a write fails.
        """
        said = await self._ask("human-monitor-command", {"command-line": f"qemu-io {node} flush"})
        if said.strip():
            raise UnavailableError(f"QEMU does not flush {node}: {said.strip()}")

    async def _ask(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        try:
            async with asyncio.timeout(CALL_SECONDS_MAX):
                return await self._client.execute(command, arguments)
        except (QMPError, OSError, TimeoutError, EOFError) as error:
            told = str(error) or type(error).__name__
            raise UnavailableError(f"QEMU does not do {command}: {told}") from error
