"""The jobs that there are, step by step.

Source: docs/CONTROL.md §9.
"""

from types import MappingProxyType

from sqlalchemy import delete

from appliance.config_server.protection.abandoning import let_machine_go
from appliance.config_server.protection.jobs import JobKind
from appliance.config_server.protection.machines import next_order
from appliance.config_server.protection.table import Event
from appliance.config_server.protection.transition import (
    REMOVING,
    enter,
    forget_points,
)
from appliance.config_server.protection.workflow import (
    Done,
    MachineScene,
    Step,
    StepFailedError,
    Verdict,
    Waiting,
    Workflows,
    machine_workflow,
)
from appliance.config_server.recovery.settling import drop_all, settle, vms_left
from appliance.config_server.store.schema import Node, ProtectedDisk
from replication.control.report import Phase

SILENT_NS = 60 * 10**9
"""An agent or process server that was not heard for so long is not waited for when protection
ends.
"""

_AGENT_HINT = "see that the agent runs and reaches the config server, then ask again"
_APPLIER_HINT = (
    "see that process server and applier run and reach the config server, then ask again"
)


async def _make_key(scene: MachineScene) -> Verdict:
    await scene.ports.ensure_key(scene.session, scene.machine.id)
    return Done()


async def _tell_appliance(scene: MachineScene) -> Verdict:
    await scene.tell(scene.machine.process_server_id, scene.machine.applier_id)
    return Done()


async def _appliance_follows(scene: MachineScene) -> Verdict:
    for node in (scene.machine.process_server_id, scene.machine.applier_id):
        if node is not None and not await scene.has_heard(node):
            return Waiting(f"waits for {await _name(scene, node)}")
    return Done()


async def _tell_agent(scene: MachineScene) -> Verdict:
    await scene.tell(scene.machine.id)
    return Done()


async def _agent_replicates(scene: MachineScene) -> Verdict:
    report = await scene.agent()
    if report is None:
        return Waiting("waits for the agent to follow its new assignment")
    if report.phase is Phase.FAILED:
        raise StepFailedError(
            f"the agent cannot replicate: {report.reason or 'it does not say why'}",
            code="agent_failed",
            hint="mend what it names, then protect the machine again",
        )
    if report.phase is Phase.IDLE:
        return Waiting("waits for the agent to begin")
    return Done(f"the agent says: {report.phase}")


async def _enabled(scene: MachineScene) -> None:
    enter(scene.machine, Event.ENABLED, scene.now_ns)


async def _not_enabled(scene: MachineScene) -> None:
    """What the applier may have begun goes too, unless it had points of the machine before."""
    machine = scene.machine
    enter(machine, Event.ENABLE_FAILED, scene.now_ns)
    await scene.tell(machine.id, machine.process_server_id, machine.applier_id)
    machine.policy_id = machine.process_server_id = None
    if not scene.job.request.get("had_points"):
        machine.points = REMOVING
        await _forget_disks(scene)


async def _vms_gone(scene: MachineScene) -> Verdict:
    """Their disks are made over its points, so they go first."""
    failovers, tell = await drop_all(scene.session, scene.machine)
    tell |= await settle(scene.session, failovers, scene.heard, scene.now_ns)
    await scene.tell(*tell)
    left = await vms_left(scene.session, failovers)
    told = "1 virtual machine" if left == 1 else f"{left} virtual machines"
    return Waiting(f"waits for {told} to be gone") if left else Done()


async def _tell_all(scene: MachineScene) -> Verdict:
    """From this transaction on the applier may delete the points, if that was asked for."""
    if not scene.job.request["keep_points"]:
        scene.machine.points = REMOVING
    await scene.tell(scene.machine.id, scene.machine.process_server_id, scene.machine.applier_id)
    return Done()


async def _agent_stopped(scene: MachineScene) -> Verdict:
    report = await scene.agent()
    if report is not None:
        if report.phase in (Phase.IDLE, Phase.FAILED):
            return Done()
        return Waiting(f"waits for the agent to stop; it says: {report.phase}")
    heard = await scene.heard(scene.machine.id)
    if heard is None or scene.now_ns - heard.seen_ns > SILENT_NS:
        return Done("the agent is silent; it stops when it is heard again")
    return Waiting("waits for the agent to follow its new assignment")


async def _points_removed(scene: MachineScene) -> Verdict:
    if scene.machine.points != REMOVING or scene.machine.applier_id is None:
        return Done("the points are kept")
    if await _process_server_sends(scene):
        # What it puts into the cache once the applier looks no more would stay there.
        return Waiting(f"waits for {await _name(scene, scene.machine.process_server_id)}")
    store = await scene.store()
    if store is not None and store.removed:
        return Done()
    return Waiting(f"waits for {await _name(scene, scene.machine.applier_id)} to delete the points")


async def _process_server_sends(scene: MachineScene) -> bool:
    """Whether it may still upload what it has of the machine; one that is silent for long is not
    waited for.
    """
    node = scene.machine.process_server_id
    if node is None or await scene.has_heard(node):
        return False
    heard = await scene.heard(node)
    return heard is not None and scene.now_ns - heard.seen_ns <= SILENT_NS


async def _disabled(scene: MachineScene) -> None:
    machine = scene.machine
    enter(machine, Event.DISABLED, scene.now_ns)
    await scene.tell(machine.id, machine.process_server_id, machine.applier_id)
    machine.policy_id = machine.process_server_id = None
    machine.resync_in_window = machine.final_wanted = False
    if machine.points == REMOVING:
        forget_points(machine)
        await _forget_disks(scene)


async def _not_disabled(scene: MachineScene) -> None:
    enter(scene.machine, Event.DISABLE_FAILED, scene.now_ns)


async def _agent_follows(scene: MachineScene) -> Verdict:
    if await scene.agent() is None:
        return Waiting("waits for the agent to follow its new assignment")
    return Done()


async def _nothing(scene: MachineScene) -> None:
    del scene


async def _disk_back(scene: MachineScene) -> None:
    """The disk is again as it was before somebody asked."""
    disk = await scene.session.get(ProtectedDisk, (scene.machine.id, scene.job.request["index"]))
    if disk is not None:
        disk.excluded = scene.job.kind == JobKind.ADD_DISK
        scene.machine.revision += 1
        await scene.tell(scene.machine.id)


async def _agent_resynchronises(scene: MachineScene) -> Verdict:
    if not scene.job.request["now"]:
        return Done("it is ordered when the policy's window opens")
    report = await scene.agent()
    if report is None:
        return Waiting("waits for the agent to follow its new assignment")
    machine = scene.machine
    if report.resync_request > machine.resync_request:
        # It counts further than we remember, so the order looks done to it.
        machine.resync_request = next_order(machine, await scene.heard(machine.id))
        machine.revision += 1
        await scene.tell(machine.id)
        return Waiting("orders it again: the agent has carried out more orders than are known here")
    if report.phase is Phase.RESYNCHRONISING or report.resync_request == machine.resync_request:
        return Done(f"the agent says: {report.phase}")
    return Waiting(f"waits for the agent to begin; it says: {report.phase}")


async def _forget_disks(scene: MachineScene) -> None:
    await scene.session.execute(
        delete(ProtectedDisk).where(ProtectedDisk.machine_id == scene.machine.id)
    )


async def _name(scene: MachineScene, node: object) -> str:
    row = await scene.session.get(Node, node)
    return row.name if row is not None else str(node)


_DISK_STEPS = (
    Step("tell the agent", _tell_agent),
    Step(
        "the agent follows",
        _agent_follows,
        late="the agent did not take the changed disks",
        hint=_AGENT_HINT,
    ),
)

WORKFLOWS: Workflows = MappingProxyType(
    {
        workflow.kind: workflow
        for workflow in (
            machine_workflow(
                JobKind.PROTECT,
                (
                    Step("make the data key", _make_key),
                    Step("tell process server and applier", _tell_appliance),
                    Step(
                        "process server and applier follow",
                        _appliance_follows,
                        late="process server or applier did not answer",
                        hint=_APPLIER_HINT,
                    ),
                    Step("tell the agent", _tell_agent),
                    Step(
                        "the agent replicates",
                        _agent_replicates,
                        late="the agent did not answer",
                        hint=_AGENT_HINT,
                    ),
                ),
                _enabled,
                _not_enabled,
                let_machine_go,
            ),
            machine_workflow(
                JobKind.UNPROTECT,
                (
                    Step(
                        "virtual machines are gone",
                        _vms_gone,
                        late="the compute node did not remove the virtual machines",
                        hint="see that it runs, or revoke its certificate if it is gone for good; "
                        "then unprotect the machine again",
                    ),
                    Step("tell all nodes", _tell_all),
                    Step("the agent stops", _agent_stopped),
                    Step(
                        "the points are settled",
                        _points_removed,
                        late="process server or applier did not let go of the machine",
                        hint="see that both run, then unprotect the machine again",
                    ),
                ),
                _disabled,
                _not_disabled,
                let_machine_go,
            ),
            machine_workflow(JobKind.ADD_DISK, _DISK_STEPS, _nothing, _disk_back, let_machine_go),
            machine_workflow(
                JobKind.EXCLUDE_DISK, _DISK_STEPS, _nothing, _disk_back, let_machine_go
            ),
            machine_workflow(
                JobKind.RESYNC,
                (
                    Step("tell the agent", _tell_agent),
                    Step(
                        "the agent resynchronises",
                        _agent_resynchronises,
                        late="the agent did not begin the resync",
                        hint="the order stands: it begins when the agent is heard; " + _AGENT_HINT,
                    ),
                ),
                _nothing,
                _nothing,
                let_machine_go,
            ),
        )
    }
)
