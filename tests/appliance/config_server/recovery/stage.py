"""Recovery with a real database and real durable workflows: an applier that holds points, a compute
node that makes VMs, agents that freeze, as their assignments say.

What the nodes do follows from rows alone, so that those of a config server which starts again go on
where the former ones were. Points of every machine: `POINTS`.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select

from appliance.config_server.nodes.assignments import for_applier, for_compute
from appliance.config_server.protection import requests as protection
from appliance.config_server.protection.config import JobsConfig
from appliance.config_server.protection.part import nothing
from appliance.config_server.protection.table import SENDING
from appliance.config_server.protection.workflows import WORKFLOWS
from appliance.config_server.recovery.part import Recovery
from appliance.config_server.recovery.ports import (
    ActionOrder,
    ActionOutcome,
    ActionPort,
    RecoveryPorts,
)
from appliance.config_server.recovery.requests import begin_failover
from appliance.config_server.recovery.run import (
    FailoverKind,
    FailoverOptions,
    RunMachine,
)
from appliance.config_server.recovery.workflows import recovery_workflows
from appliance.config_server.store.recovery_tables import Failover, PointHold, RecoveredVm
from appliance.config_server.store.schema import Job, Machine, Node, VCenter, VirtualMachine
from replication.control.recovery import (
    HeldPoint,
    Hold,
    PointChoice,
    PointDisk,
    VirtualMachineOrder,
    VmCheck,
    VmPower,
    VmReport,
    VmState,
)
from replication.control.report import (
    ApplierReport,
    ComputeReport,
    Load,
    MachineReport,
    Phase,
    Report,
)
from replication.errors import UnavailableError
from tests.appliance.config_server.protection.stage import (
    GIB,
    JOBS,
    MACHINE,
    WAIT_SECONDS,
    Nodes,
    Stage,
    certificate,
    open_stage,
)

COMPUTE = uuid.UUID(int=4)
OTHER = uuid.UUID(int=5)
VCENTER = uuid.UUID(int=6)
VMS = {MACHINE: uuid.UUID(int=7), OTHER: uuid.UUID(int=8)}
NAMES = {MACHINE: "web-1", OTHER: "db-1"}
BIOS = {MACHINE: uuid.UUID(int=99), OTHER: uuid.UUID(int=98)}
POINTS = {"old": 5, "newer": 7, "newest": 9}
"""By name: the numbers of their changesets."""

APP_CONSISTENT = "newer"
DISKS = (PointDisk(index=0, name="sda", size_bytes=GIB),)


@dataclass(slots=True)
class RecoveryNodes(Nodes):
    """behind:  machines whose durable changesets are not applied yet.
    frozen_not: why agents cannot freeze.
    broken:     why VMs of these names cannot be made. unwell: why their checks fail.
    stuck:      names of VMs that never come up.
    memory_bytes: of the compute node.
    point_count, open_repairs, applied: of every machine, as its applier counts them.
    """

    behind: set[uuid.UUID] = field(default_factory=set)
    frozen_not: str = ""
    broken: dict[str, str] = field(default_factory=dict)
    unwell: dict[str, str] = field(default_factory=dict)
    stuck: set[str] = field(default_factory=set)
    memory_bytes: int = 64 * GIB
    point_count: int = 0
    open_repairs: int = 0
    applied: int = 9
    holds: list[PointHold] = field(default_factory=list)
    vms: list[RecoveredVm] = field(default_factory=list)

    async def furnish(self) -> None:
        """A second machine, a compute node, and the VMs of both machines in a vCenter."""
        async with self.database.writing() as session:
            if await session.get(Node, COMPUTE) is not None:
                return
            now_ns = self.clock()
            session.add(Node(id=COMPUTE, role="compute", name="compute-1", enrolled_ns=now_ns))
            session.add(
                Node(
                    id=OTHER,
                    role="machine",
                    name=NAMES[OTHER],
                    enrolled_ns=now_ns,
                    bios_uuid=BIOS[OTHER],
                )
            )
            session.add(
                VCenter(
                    id=VCENTER,
                    name="vcenter-1",
                    url="https://vcenter",
                    username="reader",
                    password=b"",
                    ca_pem="",
                    added_ns=now_ns,
                    state="connected",
                )
            )
            await session.flush()
            for node in (COMPUTE, OTHER):
                session.add(certificate(node, now_ns))
            for machine, vm in VMS.items():
                session.add(
                    VirtualMachine(
                        id=vm,
                        vcenter_id=VCENTER,
                        moid=f"vm-{vm.int}",
                        name=NAMES[machine],
                        bios_uuid=BIOS[machine],
                        power="poweredOn",
                        addresses=[],
                        disks=[],
                        updated_ns=now_ns,
                    )
                )

    async def report(self) -> None:
        async with self.database.reading() as session:
            self.holds = list(await session.scalars(select(PointHold)))
            self.vms = list(await session.scalars(select(RecoveredVm)))
        await Nodes.report(self)

    def _report(self, node: Node, machines: Iterable[Machine], version: int) -> Report:
        before = self.reports.get(node.id)
        if node.id in self.stubborn and before is not None:
            return before.report.model_copy(update={"time_ns": self.clock()})
        if node.role == "compute":
            return self._compute(node, version)
        report = Nodes._report(self, node, machines, version)
        if isinstance(report, ApplierReport):
            asked = for_applier(node, (), self.holds).holds
            count = {
                "point_count": self.point_count,
                "open_repairs": self.open_repairs,
                "generation": 1,
                "applied": self.applied,
            }
            told = {
                "holds": tuple(self._held(hold) for hold in asked),
                "stores": tuple(store.model_copy(update=count) for store in report.stores),
            }
            return report.model_copy(update=told)
        machine = next((each for each in machines if each.id == node.id), None)
        if isinstance(report, MachineReport) and machine is not None:
            return self._agent(report, machine)
        return report

    def _agent(self, report: MachineReport, machine: Machine) -> MachineReport:
        phase = Phase.REPLICATING if machine.state in SENDING else report.phase
        report = report.model_copy(update={"phase": phase, "committed": 9})
        if not machine.final_wanted:
            return report
        if self.frozen_not:
            return report.model_copy(update={"final_reason": self.frozen_not})
        final = {"final": machine.final_order, "final_generation": 1, "final_number": 10}
        return report.model_copy(update=final)

    def _held(self, hold: Hold) -> HeldPoint:
        told = HeldPoint(id=hold.id, machine=hold.machine, state="waiting")
        if hold.choice == PointChoice.LATEST:
            if hold.machine in self.behind:
                return told.model_copy(update={"reason": "changeset 1.9 is still to be applied"})
            number = max(hold.number, POINTS["newest"])
            return self._point(told, "final" if number > POINTS["newest"] else "newest", number)
        name = {
            PointChoice.LATEST_PROCESSED.value: "newest",
            PointChoice.LATEST_APP_CONSISTENT.value: APP_CONSISTENT,
        }.get(hold.choice, hold.choice)
        if name not in POINTS:
            refused = {"state": "refused", "reason": f"there is no point {name}"}
            return told.model_copy(update=refused)
        return self._point(told, name, POINTS[name])

    def _point(self, told: HeldPoint, name: str, number: int) -> HeldPoint:
        return told.model_copy(
            update={
                "state": "held",
                "folder": NAMES[told.machine],
                "point": name,
                "generation": 1,
                "number": number,
                "time_ns": self.clock(),
                "consistency": "app" if name == APP_CONSISTENT else "crash",
                "disks": DISKS,
            }
        )

    def _compute(self, node: Node, version: int) -> ComputeReport:
        told = for_compute(node, self.vms)
        return ComputeReport(
            time_ns=self.clock(),
            assignment=version,
            load=Load(memory_bytes=self.memory_bytes),
            accelerator="tcg",
            vms=tuple(self._vm(order) for order in told.vms),
            removed=told.removed,
        )

    def _vm(self, order: VirtualMachineOrder) -> VmReport:
        if order.name in self.broken:
            return VmReport(id=order.id, state=VmState.FAILED, reason=self.broken[order.name])
        state = {
            VmPower.DISKS: VmState.DISKS_READY,
            VmPower.OFF: VmState.STOPPED,
            VmPower.ON: VmState.STARTING if order.name in self.stuck else VmState.UP,
        }[order.power]
        unwell = self.unwell.get(order.name, "")
        return VmReport(
            id=order.id,
            state=state,
            address="10.0.0.2",
            independent=order.independent,
            independent_share=1.0 if order.independent else 0.0,
            check=VmCheck(passed=not unwell, detail=unwell) if state is VmState.UP else None,
        )


@dataclass(slots=True)
class Power:
    """A vCenter. ``refuses``: why it does nothing. ``off``: what it has switched off, and what
    happens ``then``.
    """

    refuses: str = ""
    then: Callable[[uuid.UUID], Awaitable[None]] | None = None
    off: list[uuid.UUID] = field(default_factory=list)

    async def power_off(self, vm: uuid.UUID) -> None:
        if self.refuses:
            raise UnavailableError(self.refuses)
        self.off.append(vm)
        if self.then is not None:
            await self.then(vm)


@dataclass(slots=True)
class Actions:
    """fails:  why actions of these names fail. endless: names of those that never end."""

    fails: dict[str, str] = field(default_factory=dict)
    endless: set[str] = field(default_factory=set)
    orders: list[ActionOrder] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, order: ActionOrder) -> ActionOutcome:
        self.orders.append(order)
        self.begun.set()
        if order.name in self.endless:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.append(order.name)
        why = self.fails.get(order.name, "")
        return ActionOutcome(not why, 1 if why else 0, why, f"{order.name}: said\0 something")


@dataclass(slots=True)
class RecoveryStage(Stage):
    """What a test acts on."""

    nodes: RecoveryNodes
    power: Power
    actions: Actions
    recovery: Recovery

    async def protected(self, *names: str) -> None:
        """Machines that are protected; none is named: the first."""
        jobs = []
        for name in names or ("web-1",):
            async with self.asking() as asking:
                jobs.append(await protection.protect(asking, name, policy="gold"))
        for job in jobs:
            await self.protection.begin(job.id)
            assert (await self.ended(job.id)).state == "succeeded"
        for machine, name in NAMES.items():
            if name in (names or ("web-1",)):
                await self.machine_is(machine, "protected")

    async def machine_is(self, machine: uuid.UUID, state: str) -> Machine:
        """A machine, when it is in that state."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                await self.protection.observer.look()
                await self.recovery.look()
                async with self.database.reading() as session:
                    row = await session.get_one(Machine, machine)
                if row.state == state:
                    return row
                await asyncio.sleep(0.02)

    async def begun(
        self,
        kind: FailoverKind,
        point: str = PointChoice.LATEST.value,
        *,
        machine: uuid.UUID = MACHINE,
        options: FailoverOptions | None = None,
        compute: str | None = None,
        network: str | None = None,
    ) -> Job:
        """A failover that is asked for and started."""
        wanted = RunMachine(id=machine, point=point, options=options or FailoverOptions())
        async with self.asking() as asking:
            job = await begin_failover(asking, kind, wanted, compute=compute, network=network)
        await self.protection.begin(job.id)
        return job

    async def failed_over(
        self, kind: FailoverKind, point: str = PointChoice.LATEST.value
    ) -> Failover:
        """One that is up."""
        job = await self.ended((await self.begun(kind, point)).id)
        assert (job.state, job.error) == ("succeeded", None)
        return (await self.failovers(job))[0]

    async def failed(self, job: Job, code: str) -> str:
        """What a job says that has failed like this; nothing of it is left."""
        job = await self.ended(job.id)
        assert job.state == "failed"
        assert job.error is not None
        assert job.error["code"] == code
        await self.machine_is(MACHINE, "protected")
        assert (await self.machine()).job_id is None
        await self.nothing_is_left()
        return str(job.error["message"])

    async def failovers(self, job: Job) -> list[Failover]:
        """Those of a job's run, by group and name."""
        async with self.database.reading() as session:
            found = await session.scalars(
                select(Failover)
                .where(Failover.run_id == uuid.UUID(job.request["run"]))
                .order_by(Failover.group, Failover.machine)
            )
            return list(found)

    async def there(self) -> tuple[list[str], list[str]]:
        """Names of VMs that are ordered, and choices of holds that stand."""
        async with self.database.reading() as session:
            compute = for_compute(
                await session.get_one(Node, COMPUTE), await session.scalars(select(RecoveredVm))
            )
            holds = await session.scalars(select(PointHold).where(PointHold.ended_ns.is_(None)))
            return (
                sorted(vm.name for vm in compute.vms) + [f"-{vm}" for vm in compute.removed],
                sorted(hold.choice for hold in holds),
            )

    async def nothing_is_left(self) -> None:
        """No VM, no hold; or soon."""
        await self.left([])

    async def left(self, choices: list[str]) -> None:
        """Holds of these choices, each with a VM; or soon."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                vms, holds = await self.there()
                if (len(vms), holds) == (len(choices), choices):
                    return
                await self.recovery.look()
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def open_recovery(
    folder: Path,
    url: str | None = None,
    *,
    jobs: JobsConfig = JOBS,
    boundary: Callable[[str], None] = nothing,
    power: Power | None = None,
    actions: Actions | None = None,
    runner: ActionPort | None = None,
) -> AsyncIterator[RecoveryStage]:
    """Everything that runs in a config server for protection and recovery.

    runner: runs actions instead of ``actions``, which only say that they did.
    """
    power, actions = power or Power(), actions or Actions()
    ports = RecoveryPorts(runner or actions, power)
    own = recovery_workflows(ports, answer_seconds_max=jobs.answer_seconds_max)
    workflows = {**WORKFLOWS, **own}
    async with open_stage(
        folder, url, jobs=jobs, boundary=boundary, make_nodes=RecoveryNodes, workflows=workflows
    ) as stage:
        assert isinstance(stage.nodes, RecoveryNodes)
        recovery = Recovery(stage.database, stage.nodes.ports, stage.clock)
        yield RecoveryStage(
            stage.database,
            stage.nodes,
            stage.protection,
            stage.clock,
            power,
            actions,
            recovery,
        )
