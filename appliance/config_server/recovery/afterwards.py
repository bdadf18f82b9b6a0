"""The steps of what follows a failover: cleaned up, committed, taken back, another point.

Source: docs/RECOVERY.md §3, §4.
"""

from dataclasses import dataclass

from appliance.config_server.nodes.assignments import REMOVED
from appliance.config_server.protection.table import Event
from appliance.config_server.protection.transition import REMOVING, enter
from appliance.config_server.protection.workflow import Done, StepFailedError, Verdict, Waiting
from appliance.config_server.recovery.decisions import (
    Bad,
    CopyView,
    Good,
    Wait,
    judge_copy,
    judge_disks,
    judge_off,
)
from appliance.config_server.recovery.failing_over import FailoverSteps, make_vm
from appliance.config_server.recovery.parts import add_hold, release
from appliance.config_server.recovery.run import FailoverState
from appliance.config_server.recovery.scene import Part, RecoveryScene
from appliance.config_server.recovery.settling import (
    back_to_protected,
    end,
    nodes_of,
    remove_vms,
    settle,
    vms_left,
)
from appliance.config_server.store.recovery_tables import PointHold, RecoveredVm
from replication.control.recovery import VmPower

_MARK_NS = 60 * 10**9
"""How often it is written down how far the copy of disks is."""

GONE_LATE = "the compute node did not remove the virtual machines"
GONE_HINT = (
    "they go when it is heard again; see that it runs and reaches the config server, or revoke its "
    "certificate if it is gone for good"
)


async def remove(scene: RecoveryScene) -> Verdict:
    """Order that all VMs go."""
    tell = await remove_vms(scene.session, [part.failover.id for part in scene.parts])
    await scene.tell(*tell)
    return Done()


async def are_gone(scene: RecoveryScene) -> Verdict:
    """They are; the holds that they needed end with them."""
    await _settle(scene)
    left = await _left(scene)
    told = "1 virtual machine is" if left == 1 else f"{left} virtual machines are"
    return Waiting(f"{told} still to go") if left else Done()


async def _settle(scene: RecoveryScene) -> None:
    failovers = [part.failover for part in scene.parts]
    await scene.tell(*await settle(scene.session, failovers, scene.heard, scene.now_ns))


async def _left(scene: RecoveryScene) -> int:
    return await vms_left(scene.session, [part.failover for part in scene.parts])


async def cleaned(scene: RecoveryScene) -> None:
    """All holds have ended with the VMs."""
    for part in scene.parts:
        end(part.failover, FailoverState.CLEANED, scene.now_ns)
    await _settle(scene)


async def not_cleaned(scene: RecoveryScene) -> None:
    """What is to go, goes when its compute node is heard; nobody has to ask again."""
    for part in scene.parts:
        part.failover.job_id = None
        part.failover.revision += 1


async def cancelled(scene: RecoveryScene) -> None:
    """The machine is protected as before; its agent says what else there is to do."""
    for part in scene.parts:
        end(part.failover, FailoverState.CANCELLED, scene.now_ns)
        release(part)
        await scene.tell(*back_to_protected(part.machine, scene.now_ns))
    await _settle(scene)


async def not_cancelled(scene: RecoveryScene) -> None:
    """It stays on its way back: the VM may be gone already."""
    for part in scene.parts:
        enter(part.machine, Event.CANCEL_FAILED, scene.now_ns)
        release(part)
    await not_cleaned(scene)


async def make_independent(scene: RecoveryScene, answer_ns: int) -> Verdict:
    """The VM's disks come to stand alone, while it runs."""
    waits = []
    for part in scene.parts:
        vm = _vm(part)
        if not vm.independent:
            vm.independent = True
            await scene.tell(vm.compute_id)
        if vm.is_independent:
            continue
        report = await scene.vm_report(vm)
        heard = await scene.heard(vm.compute_id)
        since_ns = max(heard.seen_ns if heard is not None else 0, scene.now_ns - scene.waited_ns())
        still_ns = _still_ns(scene, report.independent_share if report is not None else 0.0)
        view = CopyView(scene.now_ns - since_ns, still_ns, answer_ns)
        verdict = _verdict(judge_copy(view, report))
        if isinstance(verdict, Waiting):
            waits.append(verdict.note)
        else:
            vm.is_independent = True
    return Waiting("; ".join(waits)) if waits else Done()


def _still_ns(scene: RecoveryScene, share: float) -> int:
    """Since when the share is what it is; written down with the job, for who goes on with it."""
    known = scene.job.request.get("copied", {"share": -1.0, "at_ns": scene.now_ns})
    still_ns = int(scene.now_ns - known["at_ns"])
    is_marked = known["share"] >= 0.0 and still_ns < _MARK_NS
    if is_marked or share == known["share"]:
        return still_ns
    copied = {"share": share, "at_ns": scene.now_ns}
    scene.job.request = {**scene.job.request, "copied": copied}
    return 0


async def let_go(scene: RecoveryScene) -> Verdict:
    """The point is needed no more."""
    await _settle(scene)
    return Done()


async def committed(scene: RecoveryScene) -> None:
    """There is no way back. The other points go only if somebody asked for that."""
    for part in scene.parts:
        enter(part.machine, Event.COMMITTED, scene.now_ns)
        if scene.job.request.get("delete_points"):
            part.machine.points = REMOVING
        release(part)
        part.failover.state = FailoverState.COMMITTED
        part.failover.job_id = None
        part.failover.revision += 1
        await scene.tell(*nodes_of(part.machine))


async def unchanged(scene: RecoveryScene) -> None:
    """It is failed over as before."""
    for part in scene.parts:
        release(part)
        part.failover.job_id = None
        part.failover.revision += 1


@dataclass(frozen=True, slots=True)
class PointChange:
    """Another point for a VM that is up: first the new VM's disks, then the old one is switched
    off, since both are the same machine to the network; it goes when the new one is up.
    """

    steps: FailoverSteps

    async def hold(self, scene: RecoveryScene) -> Verdict:
        """The applier keeps the new point beside the old one."""
        part = _only(scene)
        choice = scene.job.request["point"]
        if part.next_hold is None:
            part.next_hold = await add_hold(scene, part, choice)
        verdict = _verdict(await self.steps.judge_held(scene, part, part.next_hold))
        if isinstance(verdict, Done) and part.next_hold.choice != choice:
            return Done("the newest point that is processed")
        return verdict

    async def make_disks(self, scene: RecoveryScene) -> Verdict:
        """The new VM waits beside the old one."""
        part = _only(scene)
        if part.next_vm is None:
            assert part.next_hold is not None
            part.next_vm = await make_vm(scene, part, part.next_hold)
            part.failover.next_vm_id = part.next_vm.id
        waited_ns = scene.now_ns - part.next_vm.created_ns
        report = await scene.vm_report(part.next_vm)
        return _verdict(judge_disks(report, waited_ns, self.steps.answer_ns))

    async def switch(self, scene: RecoveryScene) -> Verdict:
        """The old one is off, then the new one is started."""
        part = _only(scene)
        old, new = _vm(part), part.next_vm
        assert new is not None
        await scene.power([old], VmPower.OFF)
        if not await scene.has_heard(old.compute_id):
            return Waiting("waits for the compute node")
        verdict = _verdict(judge_off(await scene.vm_report(old)))
        if isinstance(verdict, Done):
            await scene.power([new], VmPower.ON)
        return verdict

    async def check(self, scene: RecoveryScene) -> Verdict:
        """In the transaction that sees the new one up, it becomes the VM, and the old one goes."""
        part = _only(scene)
        old, new = _vm(part), part.next_vm
        if new is None:
            return Done()
        verdict = _verdict(await self.steps.judge_up(scene, part, new))
        if isinstance(verdict, Done):
            row = part.failover
            row.vm_id, row.next_vm_id = new.id, None
            row.up_ns = scene.now_ns
            row.revision += 1
            await scene.power([old], REMOVED)
        return verdict

    async def old_is_gone(self, scene: RecoveryScene) -> Verdict:
        """It need not be waited for longer than nodes have to answer: it goes by itself."""
        await _settle(scene)
        return (
            Waiting("waits for the old virtual machine to go") if await _left(scene) > 1 else Done()
        )

    async def undo(self, scene: RecoveryScene) -> None:
        """The new VM goes; when it is gone, and not before, the old one runs again (`settle`)."""
        for part in scene.parts:
            new, row = part.next_vm, part.failover
            if new is not None:
                await scene.power([new], REMOVED)
            row.next_vm_id = None
            _tell_point(row, part.hold)
        await unchanged(scene)
        await _settle(scene)


def _tell_point(row: object, hold: PointHold | None) -> None:
    """The failover's row names the point that its VM is made from."""
    if hold is None or hold.answer is None:
        return
    for column, key in (("point", "point"), ("point_ns", "time_ns"), ("consistency",) * 2):
        setattr(row, column, hold.answer[key])


def _verdict(found: Wait | Good | Bad) -> Verdict:
    if isinstance(found, Wait):
        return Waiting(found.note)
    if isinstance(found, Bad):
        raise StepFailedError(found.message, code=found.code, hint=found.hint or None)
    return Done()


def _only(scene: RecoveryScene) -> Part:
    if len(scene.parts) != 1:
        raise StepFailedError("the failover is not this job's any more", code="superseded")
    return scene.parts[0]


def _vm(part: Part) -> RecoveredVm:
    if part.vm is None:
        raise StepFailedError(f"{part.machine.name} has no virtual machine", code="vm_missing")
    return part.vm
