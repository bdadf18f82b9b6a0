"""Whether KVM can be used: only a boot tells.

A device that opens proves little: where the host itself is emulated in part, kernels hang in it and
QEMU stays alive. So the recovery guest is booted with it once, and must answer in time.
"""

import asyncio
import os
import secrets
import shutil
import tempfile
import uuid
from typing import Literal

import structlog

from azure_emu.compute.console import RESULT_PREFIX
from azure_emu.compute.evidence import read_end
from azure_emu.compute.launch import CONSOLE, Boot, launch, mark_of
from azure_emu.compute.process import find_processes, kill
from replication.control.recovery import VirtualMachineOrder
from replication.errors import ReplicationError

KVM = "/dev/kvm"
PROBE_SECONDS_MAX = 15.0
POLL_SECONDS = 0.2
PROBE_PREFIX = "probe-"


async def choose_accelerator(
    wanted: Literal["auto", "kvm", "tcg"], guest_folder: str, scratch: str
) -> str:
    """``kvm`` or ``tcg``. What is asked for by name is taken as it is."""
    if wanted != "auto":
        return wanted
    if not os.access(KVM, os.R_OK | os.W_OK):
        return "tcg"
    works = await _probe(guest_folder, scratch)
    structlog.get_logger().info("KVM probed", works=works)
    return "kvm" if works else "tcg"


async def _probe(guest_folder: str, scratch: str) -> bool:
    """Whether the recovery guest answers in time when KVM runs it."""
    with tempfile.TemporaryDirectory(prefix=PROBE_PREFIX, dir=scratch) as folder:
        order = VirtualMachineOrder(
            id=uuid.uuid4(), name="probe", machine=uuid.uuid4(), disks=(), network=""
        )
        nonce = secrets.token_hex(8)
        boot = Boot(folder, order, (), None, "kvm", guest_folder, nonce)
        try:
            async with asyncio.timeout(PROBE_SECONDS_MAX):
                await launch(boot)
                wanted = RESULT_PREFIX + b'{"nonce":"' + nonce.encode()
                while wanted not in read_end(os.path.join(folder, CONSOLE), 1 << 20):  # noqa: ASYNC110
                    await asyncio.sleep(POLL_SECONDS)
                return True
        except (ReplicationError, TimeoutError):
            return False
        finally:
            await _end(folder)


async def clear_probes(scratch: str) -> None:
    """End what a probe has left that was killed."""
    for name in os.listdir(scratch):
        if name.startswith(PROBE_PREFIX):
            await _end(os.path.join(scratch, name))
            await asyncio.to_thread(shutil.rmtree, os.path.join(scratch, name), ignore_errors=True)


async def _end(folder: str) -> None:
    for process in find_processes(mark_of(folder)):
        await kill(process)
