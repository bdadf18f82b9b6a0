"""The steps of a VM, as `step` names them. What must not be done twice is written down first."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping

from azure_emu.compute import disk, launch
from azure_emu.compute.boot_sector import HEAD_BYTES, boots_by_itself
from azure_emu.compute.console import RESULT_BYTES_MAX, asks_for_login, result_of
from azure_emu.compute.evidence import bound_console, read_end, send_evidence, take_screenshot
from azure_emu.compute.monitor import Monitor, StreamJob
from azure_emu.compute.step import STARTS_MAX, Process, Step
from azure_emu.compute.vm import OWN, RECOVERY, Vm, unreadable
from daemon.durable import write_whole
from replication.control.recovery import GuestChoice, VmCheck
from replication.errors import ReplicationError, StorageError

REST_SECONDS = 5.0
RETRY_SECONDS = 1.0
CONSOLE_SECONDS = 0.2
STREAM_SECONDS = 0.5
SHUT_DOWN_SECONDS_MAX = 60.0
POWER_LOOK_SECONDS = 0.2
REASON_CHARACTERS_MAX = 1900


async def make_disks(vm: Vm) -> None:
    disks = vm.disks
    vm.write()  # the order itself: from here on the folder is a VM's
    seconds = await disk.make_disks(disks)
    vm.tell("")
    vm.write(disks_ready_ns=time.time_ns(), disks_seconds=seconds)
    vm.log("disks ready", seconds=round(seconds, 3))


async def choose_guest(vm: Vm) -> None:
    choice, disks = vm.record.order.guest, vm.disks
    guest = RECOVERY
    if choice is GuestChoice.OWN:
        guest = OWN
    elif choice is GuestChoice.AUTO and disks:
        head = await disk.read_head(disks[0], HEAD_BYTES)
        guest = OWN if boots_by_itself(head) else RECOVERY
    vm.write(guest=guest)


async def start(vm: Vm) -> None:
    """Start it, when there is room; returns without it when the order changes before."""
    admitted = asyncio.ensure_future(_admit(vm))
    news = asyncio.ensure_future(vm.news.wait())
    try:
        await asyncio.wait({admitted, news}, return_when=asyncio.FIRST_COMPLETED)
        if not admitted.done():
            return
        accelerator = admitted.result()
    finally:
        for waiting in (admitted, news):
            waiting.cancel()
        await asyncio.wait({admitted, news})
    try:
        await _start(vm, accelerator)
    except BaseException:
        vm.site.admission.release(vm.id)
        raise


async def _admit(vm: Vm) -> str:
    accelerator = await asyncio.shield(vm.site.accelerator)
    await vm.site.admission.admit(vm.id, vm.memory_bytes)
    return accelerator


async def _start(vm: Vm, accelerator: str) -> None:
    order, recovery = vm.record.order, vm.record.guest == RECOVERY
    attachment = await vm.site.networks.attach(vm.id, order.network, isolated=order.isolated)
    if recovery and order.script:
        image = launch.script_image(order.script)
        write_whole(vm.folder.file(launch.SCRIPT), image)
    vm.write(
        nonce=secrets.token_hex(16) if recovery else "",
        started_ns=time.time_ns(),
        starts=vm.record.starts + 1,
        check=None,
    )
    _begin_console(vm)
    boot = launch.Boot(
        folder=vm.folder.path,
        order=order,
        disks=tuple(vm.disks),
        attachment=attachment,
        accelerator=accelerator,
        guest_folder=vm.site.config.guest_folder,
        nonce=vm.record.nonce,
        dependent=frozenset(each.index for each in await vm.dependent()),
    )
    await vm.running.start(boot)
    vm.tell("")
    vm.log("started", guest=vm.record.guest, accelerator=accelerator, process=vm.running.id)


def _begin_console(vm: Vm) -> None:
    with open(vm.folder.file(launch.CONSOLE), "ab") as console:
        console.write(_boot_line(vm))


def _boot_line(vm: Vm) -> bytes:
    """Parts the boots of a VM in its console: what was before does not count for this one."""
    return f"\n--- understudy: boot at {vm.record.started_ns} ---\n".encode()


async def read_console(vm: Vm) -> None:
    """Look for the guest's answer; wait a moment if there is none."""
    if not _take_answer(vm):
        await _bound_console(vm)
        await vm.pause(CONSOLE_SECONDS)


async def _bound_console(vm: Vm) -> None:
    """A guest writes there as long and as fast as it likes."""
    with contextlib.suppress(OSError):
        await asyncio.to_thread(bound_console, vm.folder.file(launch.CONSOLE))


def _take_answer(vm: Vm) -> bool:
    """Write down what this boot has answered, if it has."""
    end = read_end(vm.folder.file(launch.CONSOLE), RESULT_BYTES_MAX + (64 << 10))
    end = end.rpartition(_boot_line(vm))[2]
    check = None
    if vm.record.guest == RECOVERY:
        check = result_of(end, vm.record.nonce)
    elif asks_for_login(end):
        told = "; the script was not run: it is the recovery guest's" * bool(vm.record.order.script)
        check = VmCheck(passed=True, detail=f"it asks for a login on its console{told}")
    if check is None:
        return False
    up_ns = vm.record.up_ns or (time.time_ns() if check.passed else 0)
    vm.write(check=check, up_ns=up_ns, starts=0, evidence_due=True)
    vm.log("check has ended", passed=check.passed, detail=check.detail)
    return True


async def give_up(vm: Vm) -> None:
    """The boot has come to nothing, unless it has answered while nobody looked."""
    process = await vm.running.look()
    if process is not Process.NONE and _take_answer(vm):
        return
    if process is Process.NONE:
        reason = f"it ended {STARTS_MAX} times without an answer: {vm.reason}".rstrip(": ")
    elif process is Process.HALTED:
        reason = "its guest ended without an answer"
    else:
        reason = f"no answer within {vm.record.order.check_seconds_max} s"
    await fail(vm, reason)


async def fail(vm: Vm, reason: str) -> None:
    """It stays so until it is ordered otherwise."""
    reason = reason[:REASON_CHARACTERS_MAX]
    check = VmCheck(passed=False, detail=reason)
    vm.write(failed=reason, check=check, evidence_due=vm.record.started_ns > 0)
    vm.tell("")
    vm.log("failed", reason=reason)


async def kill(vm: Vm) -> None:
    """End it; what its screen shows is kept before, if it is still to be sent."""
    if vm.record.evidence_due:
        await take_screenshot(vm.folder.path, vm.running.monitor)
    vm.log("its process is ended")
    await vm.running.end()


async def resume(vm: Vm) -> None:
    assert vm.running.monitor is not None
    await vm.running.monitor.resume()
    vm.tell("")


async def await_source(vm: Vm) -> None:
    vm.tell(await unreadable(await vm.dependent()))
    await vm.pause(RETRY_SECONDS)


async def await_room(vm: Vm) -> None:
    vm.tell(f"stopped: no room in {vm.folder.path} for what it writes")
    await vm.pause(RETRY_SECONDS)


async def send(vm: Vm) -> None:
    """Try a bounded number of times; then the VM goes on without."""
    await take_screenshot(vm.folder.path, vm.running.monitor)
    try:
        await send_evidence(vm.id, vm.folder.path, vm.site.put_evidence)
    except ReplicationError as error:
        vm.log("evidence was not taken", reason=str(error))
        vm.site.health.report("evidence", warning=f"of VM {vm.id} not taken: {error}")
    else:
        vm.site.health.report("evidence")
    vm.write(evidence_due=False)


async def shut_down(vm: Vm) -> None:
    """A guest of its own is asked to; the recovery guest has nothing to save."""
    monitor = vm.running.monitor
    if vm.record.guest == OWN and monitor is not None:
        await monitor.press_power_button()
        deadline = time.monotonic() + SHUT_DOWN_SECONDS_MAX
        while time.monotonic() < deadline and not vm.record.removing:
            if await vm.running.look() is not Process.RUNNING:
                break
            await asyncio.sleep(POWER_LOOK_SECONDS)
    await vm.running.end()
    vm.log("switched off")


async def forget_boot(vm: Vm) -> None:
    """The next power-on begins anew."""
    vm.write(guest="", nonce="", started_ns=0, up_ns=0, starts=0, check=None, failed="")


async def stream(vm: Vm) -> None:
    """See that the disks are copied while the VM runs, one after the other.

    Where a copy is, QEMU alone knows: another daemon goes on with it.
    """
    monitor = vm.running.monitor
    assert monitor is not None
    await _bound_console(vm)
    for job in await monitor.streams():
        await _conclude(vm, monitor, job)
    jobs = await monitor.streams()
    dependent = await vm.dependent(look=not jobs)
    if not jobs and dependent:
        await disk.refuse_snapshots(dependent[0])
        await monitor.start_stream(dependent[0].node)
        jobs = await monitor.streams()
    under_way = sum(job.done_bytes / max(1, job.total_bytes) for job in jobs[:1])
    count = max(1, len(vm.disks))
    vm.share = min(1.0, max(0.0, (count - len(dependent) + min(1.0, under_way)) / count))
    if jobs:
        await vm.pause(STREAM_SECONDS)


async def _conclude(vm: Vm, monitor: Monitor, job: StreamJob) -> None:
    """All is on the disk before its header lets go of the point: QEMU may be killed at any time."""
    if job.state == "pending":
        await monitor.flush(job.node)  # which does not tell whether it could
        for each in vm.disks:
            if each.node == job.node and await disk.needs_source(each):
                raise StorageError(f"{each.path} cannot be flushed: is there room for it?")
        await monitor.finalize(job)
    elif job.state == "concluded":
        await monitor.dismiss(job)
        if job.error:
            raise StorageError(f"{job.node} is not copied: {job.error}")
        vm.tell("")


async def make_independent(vm: Vm) -> None:
    """Copy one disk while the VM is off; a newer order ends it, and it begins again some time."""
    dependent = await vm.dependent(look=True)
    if not dependent:
        return
    copying = asyncio.ensure_future(disk.make_independent(dependent[0]))
    news = asyncio.ensure_future(vm.news.wait())
    try:
        await asyncio.wait({copying, news}, return_when=asyncio.FIRST_COMPLETED)
        if copying.done():
            copying.result()
            vm.tell("")
    finally:
        for task in (copying, news):
            task.cancel()
        await asyncio.wait({copying, news})
    await vm.dependent(look=True)


async def remove(vm: Vm) -> None:
    """All of it, the record last."""
    await vm.running.end()
    vm.site.admission.release(vm.id)
    await vm.site.networks.detach(vm.id, vm.record.order.network)
    await asyncio.to_thread(vm.folder.remove)
    vm.tell("")
    vm.site.tell()
    vm.log("removed")


async def rest(vm: Vm) -> None:
    if vm.record.disks_ready_ns:
        await _bound_console(vm)
    await vm.pause(REST_SECONDS)


STEPS: Mapping[Step, Callable[[Vm], Awaitable[None]]] = {
    Step.MAKE_DISKS: make_disks,
    Step.CHOOSE_GUEST: choose_guest,
    Step.START: start,
    Step.RESUME: resume,
    Step.KILL: kill,
    Step.AWAIT_SOURCE: await_source,
    Step.AWAIT_ROOM: await_room,
    Step.READ_CONSOLE: read_console,
    Step.GIVE_UP: give_up,
    Step.SEND_EVIDENCE: send,
    Step.SHUT_DOWN: shut_down,
    Step.FORGET_BOOT: forget_boot,
    Step.STREAM: stream,
    Step.MAKE_INDEPENDENT: make_independent,
    Step.REMOVE: remove,
    Step.REST: rest,
}
assert set(STEPS) == set(Step)
