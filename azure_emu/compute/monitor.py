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


@dataclass(frozen=True, slots=True)
class StreamJob:
    """A disk's copy that is under way."""

    name: str
    done_bytes: int
    total_bytes: int


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

    async def start_stream(self, name: str, node: str) -> None:
        """Begin to copy into ``node`` what is only below it."""
        await self._ask("block-stream", {"job-id": name, "device": node})

    async def streams(self) -> list[StreamJob]:
        jobs = await self._ask("query-block-jobs")
        return [
            StreamJob(job["device"], job["offset"], job["len"])
            for job in jobs
            if job["type"] == "stream"
        ]

    async def _ask(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        try:
            async with asyncio.timeout(CALL_SECONDS_MAX):
                return await self._client.execute(command, arguments)
        except (QMPError, OSError, TimeoutError, EOFError) as error:
            told = str(error) or type(error).__name__
            raise UnavailableError(f"QEMU does not do {command}: {told}") from error
