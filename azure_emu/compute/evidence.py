"""Console and screenshot of a VM, handed to whoever keeps them, before they are gone."""

import asyncio
import contextlib
import os
import uuid
from collections.abc import Awaitable, Callable

from azure_emu.compute.launch import CONSOLE
from azure_emu.compute.monitor import Monitor
from replication.control.recovery import EVIDENCE_BYTES_MAX, EvidenceKind
from replication.errors import ReplicationError

SCREENSHOT = "screenshot.png"
ATTEMPTS_MAX = 5
RETRY_SECONDS = 2.0
CONSOLE_BYTES_MAX = 16 << 20
"""A longer console file is cut down to the end that is evidence."""

PutEvidence = Callable[[uuid.UUID, EvidenceKind, bytes], Awaitable[None]]


async def take_screenshot(folder: str, monitor: Monitor | None) -> None:
    """Into the VM's folder; without a process the last one stays."""
    if monitor is None:
        return
    pending = os.path.join(folder, SCREENSHOT + ".new")
    with contextlib.suppress(ReplicationError, OSError):
        await monitor.screenshot(pending)
        os.replace(pending, os.path.join(folder, SCREENSHOT))


async def send_evidence(vm: uuid.UUID, folder: str, put: PutEvidence) -> None:
    """Send what there is; each is tried ATTEMPTS_MAX times. Raises what the last attempt did."""
    for kind, name in ((EvidenceKind.CONSOLE, CONSOLE), (EvidenceKind.SCREENSHOT, SCREENSHOT)):
        content = read_end(os.path.join(folder, name), EVIDENCE_BYTES_MAX + 1)
        if kind is EvidenceKind.SCREENSHOT and len(content) > EVIDENCE_BYTES_MAX:
            continue  # half a picture is none
        if content:
            await _send(vm, kind, content[-EVIDENCE_BYTES_MAX:], put)


async def _send(vm: uuid.UUID, kind: EvidenceKind, content: bytes, put: PutEvidence) -> None:
    for attempt in range(1, ATTEMPTS_MAX + 1):
        try:
            await put(vm, kind, content)
        except ReplicationError as error:
            if attempt == ATTEMPTS_MAX or not error.retryable:
                raise
            await asyncio.sleep(RETRY_SECONDS * attempt)
        else:
            return


def read_end(path: str, size: int) -> bytes:
    """The last ``size`` bytes of a file; none where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read(size)
    except FileNotFoundError:
        return b""


def bound_console(path: str) -> None:
    """Cut a console that has grown too long down to its end. QEMU appends, so it goes on behind."""
    try:
        if os.stat(path).st_size <= CONSOLE_BYTES_MAX:
            return
    except FileNotFoundError:
        return
    end = read_end(path, EVIDENCE_BYTES_MAX)
    with open(path, "r+b") as file:
        file.truncate(0)
    with open(path, "ab") as file:
        file.write(end)
