"""How a VM's process is started: the command line, pure, and the start itself.

QEMU runs in a session of its own in the VM's network namespace and outlives the daemon. What comes
from a disk may be hostile, so it is confined to what it is given: it opens its disks, its console
and the recovery guest's files, and gets the rest opened. It may not start programs or change its
rights (seccomp). A failed read or write of a disk stops the CPUs, and so do a reboot of the
recovery guest and the power-off of any.

Source: QEMU System Emulation, Invocation; docs/adr/0018-qemu-in-landlock.md.
"""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from azure_emu.compute.confine import confined
from azure_emu.compute.disk import Disk
from azure_emu.compute.guest.build import INITRAMFS, KERNEL, TOOLS
from azure_emu.compute.monitor import POINT_SETS, SOCKET, Monitor
from azure_emu.compute.network import NAMESPACES, Attachment
from azure_emu.compute.process import find_processes
from azure_emu.compute.tool import WORDS_MAX, dying_with_us
from replication.control.recovery import VirtualMachineOrder
from replication.errors import StorageError, UnavailableError

CONSOLE = "console.log"
SCRIPT = "script.img"
SAID = "qemu.log"
START_SECONDS_MAX = 60.0
POLL_SECONDS = 0.02
ABSENT_SECONDS = 0.5
"""A process shows no arguments for the moment in which it becomes another program."""

RECOVERY_MEMORY_BYTES_MIN = 192 << 20
TRANSLATION_MEBIBYTES = 128
"""Of translated code, when the CPU is emulated."""

PROCESS_BYTES = (TRANSLATION_MEBIBYTES << 20) + (96 << 20)
"""What a process takes beside its guest's memory."""

GUEST_OPTIONS = (
    "console=tty0 console=ttyS0 quiet loglevel=1 panic=-1 tsc=unstable mitigations=off nokaslr"
    " random.trust_cpu=on no_timer_check audit=0 apparmor=0 cryptomgr.notests 8250.nr_uarts=1"
    " rcupdate.rcu_expedited=1"
)
"""Of the recovery guest's kernel. Its clock is the HPET, which QEMU keeps by the host's: a guest
that is put aside while it measures its TSC at boot can get that wrong by a factor of 20, and then
every limit of its check is over within seconds."""

KVM = "/dev/kvm"
MONITOR_DESCRIPTOR, TAP_DESCRIPTOR, POINTS_DESCRIPTOR = 10, 11, 12
READ_ONLY = ",read-only=on"
_FIRST_SLOT, _FUNCTIONS = 4, 8
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Boot:
    """One boot of a VM.

    nonce:     empty for a guest of its own.
    dependent: numbers of the disks that stand on their points. Only these have a point, and it is
               the one that was ordered, whatever the file says that whoever broke out has written.
    """

    folder: str
    order: VirtualMachineOrder
    disks: tuple[Disk, ...]
    attachment: Attachment | None
    accelerator: str
    guest_folder: str
    nonce: str
    dependent: frozenset[int] = frozenset()


def mark_of(folder: str) -> str:
    """The argument by which a VM's process is found among all."""
    return os.path.join(folder, "qemu.pid")


def memory_of(order: VirtualMachineOrder, *, recovery: bool) -> int:
    """What its guest gets."""
    return max(order.memory_bytes, RECOVERY_MEMORY_BYTES_MIN) if recovery else order.memory_bytes


def command_line(boot: Boot) -> list[str]:
    """QEMU's arguments; paths of files in the VM's folder are relative to it."""
    recovery = bool(boot.nonce)
    kvm = boot.accelerator == "kvm"
    memory = memory_of(boot.order, recovery=recovery) >> 20
    command = [
        "qemu-system-x86_64",
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-pidfile", mark_of(boot.folder)),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-uuid", str(boot.order.id)),
        *("-M", "pc", "-m", str(memory), "-smp", str(boot.order.cpu_count)),
        *("-accel", "kvm" if kvm else f"tcg,tb-size={TRANSLATION_MEBIBYTES}"),
        *("-cpu", "host" if kvm else "max,la57=off"),
        *("-chardev", f"socket,id=qmp,fd={MONITOR_DESCRIPTOR},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"file,id=console,path={CONSOLE},append=on", "-serial", "chardev:console"),
        *("-device", "VGA,addr=2", "-device", "virtio-rng-pci,addr=3"),
        *("-action", f"reboot={'shutdown' if recovery else 'reset'},shutdown=pause"),
    ]
    if boot.attachment is not None:
        mac = boot.attachment.mac
        command += ["-netdev", f"tap,id=net,fd={TAP_DESCRIPTOR}"]
        command += ["-device", f"virtio-net-pci,netdev=net,mac={mac},romfile=,addr=1e"]
    for number, disk in enumerate(boot.disks):
        if disk.index in boot.dependent:
            chosen = f"set={POINT_SETS + disk.index}"
            command += ["-add-fd", f"fd={POINTS_DESCRIPTOR + number},{chosen}"]
        first = number == 0 and not recovery
        command += [
            *("-blockdev", json.dumps(_image(disk, is_alone=disk.index not in boot.dependent))),
            *("-device", _device(number, disk.node, first=first)),
        ]
    if recovery:
        command += ["-kernel", os.path.join(boot.guest_folder, KERNEL)]
        command += ["-initrd", os.path.join(boot.guest_folder, INITRAMFS)]
        command += ["-append", guest_options(boot)]
        if boot.order.script:
            images = {"script": SCRIPT, "tools": os.path.join(boot.guest_folder, TOOLS)}
            for extra, (name, file) in enumerate(images.items()):
                command += [
                    *("-blockdev", f"node-name=file-{name},driver=file,filename={file}{READ_ONLY}"),
                    *("-blockdev", f"node-name={name},driver=raw,file=file-{name}{READ_ONLY}"),
                    *("-device", _device(len(boot.disks) + extra, name, first=False)),
                ]
    return command


def _image(disk: Disk, *, is_alone: bool) -> dict[str, object]:
    """The disk's file over its point's, which is let go of when the copy of it has ended."""
    name = disk.node
    file = {"driver": "file", "node-name": f"file-{name}", "filename": os.path.basename(disk.path)}
    point = {"driver": "file", "filename": f"/dev/fdset/{POINT_SETS + disk.index}"}
    backing = {"driver": "raw", "read-only": True, "file": point | {"read-only": True}}
    image = {"driver": "qcow2", "node-name": name, "discard": "unmap"}
    return image | {"file": file | {"discard": "unmap"}, "backing": None if is_alone else backing}


def confined_command(boot: Boot) -> list[str]:
    """QEMU, to be run in the VM's folder, with what it may reach."""
    read = []
    if boot.nonce:
        read += [os.path.join(boot.guest_folder, name) for name in (KERNEL, INITRAMFS)]
        if boot.order.script:
            read += [SCRIPT, os.path.join(boot.guest_folder, TOOLS)]
    write = [os.path.basename(disk.path) for disk in boot.disks]
    write += [CONSOLE, os.path.basename(mark_of(boot.folder))]
    if boot.accelerator == "kvm":
        write.append(KVM)
    points = [
        (POINTS_DESCRIPTOR + number, disk.source)
        for number, disk in enumerate(boot.disks)
        if disk.index in boot.dependent
    ]
    return confined(
        command_line(boot),
        read=read,
        write=write,
        opened=points,
        listening=(MONITOR_DESCRIPTOR, SOCKET),
        tap=(TAP_DESCRIPTOR, boot.attachment.tap) if boot.attachment is not None else None,
    )


def guest_options(boot: Boot) -> str:
    """The recovery guest's kernel command line."""
    options = f"{GUEST_OPTIONS} understudy.nonce={boot.nonce}"
    options += f" understudy.seconds={boot.order.check_seconds_max}"
    if boot.attachment is not None:
        options += f" understudy.address={boot.attachment.address}"
        options += f" understudy.gateway={boot.attachment.gateway}"
    return options


def script_image(script: str) -> bytes:
    """The script as a disk: padded with ends of line to whole sectors."""
    content = script.encode("utf-8", "replace") + b"\n"
    return content + b"\n" * (-len(content) % _SECTOR)


def _device(number: int, name: str, *, first: bool) -> str:
    slot, function = _FIRST_SLOT + number // _FUNCTIONS, number % _FUNCTIONS
    place = f"addr={slot:x}.{function}" + (",multifunction=on" if function == 0 else "")
    told = f"virtio-blk-pci,drive={name},serial={name},{place},rerror=stop,werror=stop"
    if name in ("script", "tools"):
        return told
    return told + ",write-cache=on" + (",bootindex=0" if first else "")


async def launch(boot: Boot) -> int:
    """Start the process and return its id when its monitor answers.

    Raises StorageError with QEMU's words when it ends at once (a disk cannot be opened or is in
    use), UnavailableError when it is silent.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(boot.folder, SOCKET))
    said = os.path.join(boot.folder, SAID)
    for own in (os.path.join(boot.folder, CONSOLE), mark_of(boot.folder)):
        with open(own, "ab"):  # noqa: ASYNC230 - QEMU may make no file
            pass
    command = confined_command(boot)
    if boot.attachment is not None:
        command = ["nsenter", f"--net={NAMESPACES}/{boot.attachment.namespace}", "--", *command]
    await _detach(command, boot.folder, said)
    return await _answering(boot.folder, said)


async def _detach(command: Sequence[str], folder: str, said: str) -> None:
    with open(said, "wb") as log:  # noqa: ASYNC230 - a new file, and nothing is written here
        process = await asyncio.create_subprocess_exec(
            *dying_with_us(["setsid", "--fork", *command]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    if await process.wait() != 0:
        raise StorageError(f"QEMU was not started: {_last_words(said)}")


async def _answering(folder: str, said: str) -> int:
    mark, seen_at = mark_of(folder), time.monotonic()
    try:
        async with asyncio.timeout(START_SECONDS_MAX):
            while True:
                processes = find_processes(mark)
                if processes:
                    seen_at = time.monotonic()
                elif time.monotonic() - seen_at > ABSENT_SECONDS:
                    raise StorageError(f"QEMU ended at its start: {_last_words(said)}")
                with contextlib.suppress(UnavailableError):
                    await (await Monitor.connect(folder)).close()
                    if len(processes) == 1:
                        return processes[0]
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError as error:
        raise UnavailableError(f"QEMU is silent for {START_SECONDS_MAX:.0f} s") from error


def _last_words(said: str) -> str:
    try:
        with open(said, "rb") as file:
            return file.read()[-WORDS_MAX:].decode(errors="replace").strip() or "(nothing)"
    except OSError as error:
        return str(error)
