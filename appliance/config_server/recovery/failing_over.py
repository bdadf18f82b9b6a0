"""The steps of a failover or test failover, from the final changeset to a VM that is up.

Each may be asked again at any time. What it has written down tells it what is done: a hold, a VM,
an order, a time.

Source: docs/RECOVERY.md §4.
"""

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from appliance.config_server.nodes.assignments import FINAL_SECONDS_MAX
from appliance.config_server.protection.machines import next_final
from appliance.config_server.protection.workflow import Done, Verdict, Waiting, store_of
from appliance.config_server.recovery.decisions import (
    Bad,
    Good,
    HoldView,
    Instead,
    Stamp,
    Wait,
    judge_disks,
    judge_hold,
    judge_store,
    judge_vm,
    source_disks,
    vm_name,
)
from appliance.config_server.recovery.parts import (
    add_hold,
    add_note,
    judge_each,
    take_held,
)
from appliance.config_server.recovery.run import FailoverState
from appliance.config_server.recovery.scene import Part, RecoveryScene
from appliance.config_server.recovery.switching_off import THAW_HINT
from appliance.config_server.store.recovery_tables import PointHold, RecoveredVm
from replication.control.recovery import HeldPoint, PointChoice, VmPower
from replication.control.report import MachineReport, ProcessServerReport, StoreReport

KNOWN_WRONG = (
    "runs of blocks that were wrong at the second site when the point was held, and not mended: {}"
)
_SECOND_NS = 10**9
_FINAL_NS = int(FINAL_SECONDS_MAX * _SECOND_NS)


@dataclass(frozen=True, slots=True)
class FailoverSteps:
    """answer_ns: what a node has to answer."""

    answer_ns: int

    async def send_final(self, scene: RecoveryScene) -> Verdict:
        """The agents let no more writes be acknowledged, and send what was written before.

        Not while something is known to be wrong at the second site: nobody could mend it later.
        """

        async def judge_before(part: Part) -> Wait | Good | Bad:
            store = await _store_of(scene, part)
            return judge_store(store, scene.waited_ns(), self.answer_ns)

        verdict = await judge_each(scene, _without_final(scene), judge_before)
        if isinstance(verdict, Waiting):
            return verdict
        parts, new = scene.active(), _without_final(scene)
        for part in new:
            heard = await scene.heard(part.machine.id)
            part.machine.final_order = part.failover.final = next_final(part.machine, heard)
            part.machine.final_wanted = True
            part.machine.revision += 1
            part.failover.final_ns = scene.now_ns
        await scene.tell(*(part.machine.id for part in new))

        async def judge(part: Part) -> Wait | Good | Bad:
            row = part.failover
            report = await scene.agent_of(part.machine.id)
            if not row.final_number and report is not None and report.final == row.final:
                row.final_generation, row.final_number = (
                    report.final_generation,
                    report.final_number,
                )
            if row.final_number:
                final = Stamp(row.final_generation, row.final_number)
                since_ns = scene.now_ns - row.final_ns
                return judge_store(await _store_of(scene, part), since_ns, _FINAL_NS, final)
            if report is not None and report.final_reason:
                return Bad("not_frozen", f"the agent cannot: {report.final_reason}", THAW_HINT)
            if scene.now_ns - row.final_ns > _FINAL_NS:
                late = f"no final changeset within {FINAL_SECONDS_MAX:.0f} s"
                return Bad("not_frozen", late, THAW_HINT)
            return Wait(f"waits for the agent's final changeset, {FINAL_SECONDS_MAX:.0f} s at most")

        return await judge_each(scene, parts, judge)

    async def hold_points(self, scene: RecoveryScene) -> Verdict:
        """The appliers choose the points and keep them."""
        parts = scene.active()
        taken_instead: list[str] = []

        async def judge(part: Part) -> Wait | Good | Bad:
            if part.hold is None:
                stamp = await _stamp_of(scene, part)
                part.hold = await add_hold(
                    scene,
                    part,
                    part.failover.choice,
                    generation=stamp.generation,
                    number=stamp.number,
                )
            if part.hold.choice != part.failover.choice:
                taken_instead.append(part.machine.name)
            row = part.failover
            final = Stamp(row.final_generation, row.final_number) if row.final else None
            return await self.judge_held(scene, part, part.hold, final)

        verdict = await judge_each(scene, parts, judge)
        note = _instead_note(taken_instead, parts)
        if isinstance(verdict, Waiting):
            return verdict
        return Done(note)

    async def judge_held(
        self, scene: RecoveryScene, part: Part, hold: PointHold, final: Stamp | None = None
    ) -> Wait | Good | Bad:
        """What has become of a hold; another one takes its place where it takes too long."""
        if hold.answer is not None:
            return Good()
        held = await scene.held(hold)
        view = HoldView(
            machine=part.machine.id,
            name=part.machine.name,
            choice=hold.choice,
            waited_ns=scene.now_ns - hold.created_ns,
            wait_seconds=part.options.wait_seconds,
            answer_ns=self.answer_ns,
            final=final,
        )
        found = judge_hold(view, held)
        if isinstance(found, Good):
            assert held is not None
            take_held(part, hold, held)
            store = await _store_of(scene, part)
            if store is not None and store.open_repairs:
                add_note(part.failover, KNOWN_WRONG.format(store.open_repairs))
        if isinstance(found, Instead):
            hold.ended_ns = scene.now_ns
            await add_hold(scene, part, found.choice)
            return Wait(
                "the newest point that is processed is taken: what is durable takes too long"
            )
        return found

    async def make_disks(self, scene: RecoveryScene) -> Verdict:
        """All VMs' disks are made over their points."""
        parts = scene.active()
        for part in parts:
            if part.vm is None:
                assert part.hold is not None
                part.vm = await make_vm(scene, part, part.hold)
                part.failover.vm_id = part.vm.id

        async def judge(part: Part) -> Wait | Good | Bad:
            assert part.vm is not None
            waited_ns = scene.now_ns - part.vm.created_ns
            return judge_disks(await scene.vm_report(part.vm), waited_ns, self.answer_ns)

        return await judge_each(scene, parts, judge)

    def start(self, group: int) -> Callable[[RecoveryScene], Awaitable[Verdict]]:
        """Switch on a group's VMs."""

        async def act(scene: RecoveryScene) -> Verdict:
            parts = scene.active(group)
            await scene.power([part.vm for part in parts], VmPower.ON)
            return Done("" if parts else "nothing is left to start")

        return act

    def check(self, group: int) -> Callable[[RecoveryScene], Awaitable[Verdict]]:
        """They are up, and have passed their checks."""

        async def act(scene: RecoveryScene) -> Verdict:
            async def judge(part: Part) -> Wait | Good | Bad:
                assert part.vm is not None
                found = await self.judge_up(scene, part, part.vm)
                if isinstance(found, Good):
                    part.failover.state = FailoverState.UP
                    part.failover.up_ns = scene.now_ns
                    part.failover.revision += 1
                return found

            return await judge_each(scene, scene.active(group), judge)

        return act

    async def judge_up(
        self, scene: RecoveryScene, part: Part, vm: RecoveredVm
    ) -> Wait | Good | Bad:
        """Whether a VM is up; what its compute node says of it in the end is kept."""
        report = await scene.vm_report(vm)
        found = judge_vm(
            report,
            scene.waited_ns(),
            check_seconds_max=part.options.check_seconds_max,
            answer_ns=self.answer_ns,
        )
        if report is not None and not isinstance(found, Wait):
            vm.report = report.model_dump(mode="json")
        return found


def _without_final(scene: RecoveryScene) -> list[Part]:
    """Those whose agents are still to be given an order."""
    return [part for part in scene.active() if part.failover.final == 0]


async def _store_of(scene: RecoveryScene, part: Part) -> StoreReport | None:
    """What its applier says of a machine's store."""
    applier = part.machine.applier_id
    return store_of(await scene.heard(applier) if applier else None, part.machine.id)


async def make_vm(scene: RecoveryScene, part: Part, hold: PointHold) -> RecoveredVm:
    """Order a VM over a held point; it waits with its disks made."""
    held = HeldPoint.model_validate(hold.answer)
    options, row = part.options, part.failover
    vm = RecoveredVm(
        id=uuid.uuid4(),
        failover_id=row.id,
        machine_id=part.machine.id,
        hold_id=hold.id,
        compute_id=row.compute_id,
        wanted=VmPower.DISKS,
        document={
            "name": vm_name(row.machine, part.kind),
            "disks": [disk.model_dump() for disk in source_disks(held)],
            "network": row.network,
            "isolated": part.is_test,
            "guest": options.guest,
            "cpu_count": options.cpu_count,
            "memory_bytes": options.memory_bytes,
            "script": options.script,
            "check_seconds_max": options.check_seconds_max,
        },
        created_ns=scene.now_ns,
    )
    scene.session.add(vm)
    await scene.session.flush()
    await scene.tell(vm.compute_id)
    return vm


async def _stamp_of(scene: RecoveryScene, part: Part) -> Stamp:
    """What the point must not be older than: the final changeset, or all that is known to be
    durable, by the agent's last word and the process server's.
    """
    row, machine = part.failover, part.machine
    if row.final:
        return Stamp(row.final_generation, row.final_number)
    if row.choice != PointChoice.LATEST:
        return Stamp()
    known = [Stamp()]
    agent = await scene.heard(machine.id)
    if agent is not None and isinstance(agent.report, MachineReport):
        known.append(Stamp(agent.report.generation, agent.report.committed))
    server = await scene.heard(machine.process_server_id) if machine.process_server_id else None
    if server is not None and isinstance(server.report, ProcessServerReport):
        known += [
            Stamp(stream.generation, stream.number)
            for stream in server.report.streams
            if stream.machine == machine.id
        ]
    return max(known)


def _instead_note(names: list[str], parts: list[Part]) -> str:
    if not names:
        return ""
    told = ", ".join(sorted(set(names)))
    late = max((part.options.wait_seconds for part in parts), default=0)
    return f"{told}: the newest processed point, since what is durable was not applied in {late} s"
