"""One VM: look how it is, ask what comes next, do it, and look again.

The loop is the only one that touches the VM's folder and its process. An error is told and tried
again; what can never work is a failure that stays until the order changes.
"""

import dataclasses
import time

from azure_emu.compute import disk
from azure_emu.compute.carry_out import RETRY_SECONDS, STEPS, fail
from azure_emu.compute.record import VmFolder, VmRecord
from azure_emu.compute.step import Process, Seen, Step, Wanted, next_step, state_of
from azure_emu.compute.vm import OWN, RECOVERY, Site, Vm, unreadable
from daemon.troubles import clipped
from replication.control.recovery import VirtualMachineOrder, VmPower, VmReport, VmState
from replication.errors import (
    ConflictError,
    InputError,
    LimitError,
    ReplicationError,
    UnavailableError,
)

GRACE_SECONDS = 30.0
"""So much longer than the check may take the recovery guest's result is waited for: it keeps the
time itself, and tells what it did not get done.
"""

ROOM_BYTES_MIN = 64 << 20


class Machine:
    """A VM that is or should be. ``run`` ends when it is removed."""

    def __init__(self, site: Site, folder: VmFolder, record: VmRecord) -> None:
        self._vm = Vm(site, folder, record)
        self._seen = Seen(disks=False, guest_chosen=False, process=Process.NONE)

    @property
    def record(self) -> VmRecord:
        return self._vm.record

    @property
    def wanted(self) -> Wanted:
        order = self.record.order
        return Wanted(order.power, order.independent, self.record.removing)

    def take(self, order: VirtualMachineOrder) -> None:
        """Follow a newer order. Raises StorageError when it cannot be written down."""
        before = self.record.order
        if order == before:
            return
        changed: dict[str, object] = {"order": order}
        if self.record.disks_ready_ns and order.disks != before.disks:
            changed["failed"] = "the disks of a VM cannot be changed: order another VM"
        elif not self.record.started_ns:
            changed |= {"failed": "", "check": None}
        self._vm.write(**changed)
        self._vm.news.set()

    def remove(self) -> None:
        """Have it go. Raises StorageError when it cannot be written down."""
        if not self.record.removing:
            self._vm.write(removing=True, evidence_due=self.record.started_ns > 0)
            self._vm.news.set()

    async def run(self) -> None:
        """Until it is removed. Raises what is a defect."""
        vm = self._vm
        try:
            while True:
                vm.news.clear()
                try:
                    self._seen = await self._look()
                    step = next_step(self._seen, self.wanted)
                    await STEPS[step](vm)
                except (InputError, ConflictError, LimitError) as error:
                    await fail(vm, str(error))
                except ReplicationError as error:
                    vm.tell(str(error))
                    await vm.pause(RETRY_SECONDS)
                else:
                    if step is Step.REMOVE:
                        return
        finally:
            await vm.running.disconnect()

    def report(self) -> VmReport:
        """How it is, by the last look."""
        record = self.record
        passed = record.check is not None and record.check.passed
        answered, failed = record.check is not None, bool(record.failed)
        seen = dataclasses.replace(self._seen, answered=answered, failed=failed)
        state = state_of(seen, self.wanted, passed=passed)
        reason = record.failed or self._vm.reason
        if state is VmState.FAILED and not reason and record.check is not None:
            reason = record.check.detail
        attachment = self._vm.site.networks.attachment(record.order.id, record.order.network)
        return VmReport(
            id=record.order.id,
            state=state,
            reason=clipped(reason),
            guest=record.guest,
            address=str(attachment.address.ip) if attachment else "",
            disks_ready_ns=record.disks_ready_ns,
            started_ns=record.started_ns,
            up_ns=record.up_ns,
            disks_seconds=record.disks_seconds,
            space_bytes=disk.space_bytes(self._vm.disks) if record.disks_ready_ns else 0,
            independent=self._seen.independent,
            independent_share=1.0 if self._seen.independent else self._vm.share,
            check=record.check,
        )

    async def _look(self) -> Seen:
        vm, record = self._vm, self.record
        try:
            process = await vm.running.look()
        except UnavailableError:
            if self.wanted.power is VmPower.ON and not record.removing:
                raise
            process = Process.STUCK  # it shall end anyway: nobody waits for its monitor
        self._count(process)
        dependent = []
        if record.disks_ready_ns and not record.removing:
            dependent = await vm.dependent()
        needed = dependent if process is Process.NONE else []
        return Seen(
            disks=record.disks_ready_ns > 0,
            guest_chosen=bool(record.guest),
            process=process,
            started=record.started_ns > 0,
            answered=record.check is not None,
            failed=bool(record.failed),
            overdue=self._overdue(),
            starts=record.starts,
            own=record.guest == OWN,
            readable=not await unreadable(needed),
            room=vm.free_bytes >= ROOM_BYTES_MIN,
            independent=record.disks_ready_ns > 0 and not dependent,
            evidence_due=record.evidence_due,
        )

    def _overdue(self) -> bool:
        record = self.record
        if not record.started_ns:
            return False
        grace = GRACE_SECONDS if record.guest == RECOVERY else 0.0
        passed = time.time() - record.started_ns / 1e9
        return passed > record.order.check_seconds_max + grace

    def _count(self, process: Process) -> None:
        """Tell who else may run."""
        vm, admission = self._vm, self._vm.site.admission
        if process is Process.NONE:
            admission.release(vm.id)
        else:
            booting = self.record.check is None
            admission.count(vm.id, vm.memory_bytes, booting=booting)
