"""The agent under a config server: it follows its assignment, and tells of itself.

Not protected, it does nothing but report what disks the machine has. Protected, it replicates as
the assignment says; another assignment ends the run cleanly and begins a new one, which goes on
where the old one was: trackers are pinned, and the state is on disk. Only an assignment that says
``protected = false`` ends tracking. Without a config server it goes on by the assignment on disk.
"""

import asyncio
import contextlib
import importlib.metadata
import time
from collections.abc import Iterator, Sequence

import structlog

from agents.mobility.app_scripts import run_post_if_due
from agents.mobility.config import AgentConfig
from agents.mobility.controlled_config import ControlledConfig, assigned_config
from agents.mobility.final_order import NOTHING_TOLD, FinalBook, FinalTold
from agents.mobility.host import read_host
from agents.mobility.inventory import find, read_inventory
from agents.mobility.machine_folder import forget, hold, machine_folder
from agents.mobility.measures import AgentMeasures
from agents.mobility.reporting import Situation, machine_report
from agents.mobility.status import AgentStatus
from agents.mobility.stream_run import Running, replicate
from daemon.control_client import ControlClient
from daemon.identity import NodeIdentity
from daemon.load import LoadMeter
from daemon.service import Health, Service
from replication.control.assignment import MachineAssignment, ResyncOrder
from replication.control.report import BlockDevice, MachineReport, Phase
from replication.control.role import NodeRole
from replication.errors import ReplicationError

RETRY_SECONDS_MIN = 1.0
RETRY_SECONDS_MAX = 30.0
STEADY_SECONDS = 60.0
"""A run that lasted so long was well begun: the next failure is a new one."""

ANNOUNCE_SECONDS_MAX = 2.0
HEALTH_PART = "replication"


def assignment_on_disk(config: ControlledConfig) -> tuple[NodeIdentity, MachineAssignment | None]:
    """Who is enrolled here and what it was told last; ConfigError when nobody is."""
    client = ControlClient(config.control, MachineAssignment, health=Health(), stop=asyncio.Event())
    return client.identity, client.assignment


def read_devices(config: ControlledConfig) -> tuple[BlockDevice, ...]:
    """The disks that this machine has and may tell of."""
    return read_inventory(
        tracker=config.tracker, state_folder=config.state_folder, only=config.control.devices
    )


async def serve(config: ControlledConfig, service: Service) -> None:
    """Follow the config server until ``service.stop`` is set."""

    def on_renewed(identity: NodeIdentity) -> None:
        agent.on_renewed(identity)

    client = ControlClient(
        config.control,
        MachineAssignment,
        health=service.health,
        stop=service.stop,
        on_renewed=on_renewed,
    )
    machine = client.identity.node
    with hold(config.state_folder, machine):
        agent = ControlledAgent(config, service, client, AgentMeasures(service.registry))
        _run_owed_scripts(config, machine_folder(config.state_folder, machine))
        async with client, asyncio.TaskGroup() as tasks:
            tasks.create_task(client.run(agent.report), name="control")
            tasks.create_task(agent.listen(), name="assignments")
            tasks.create_task(agent.drive(), name="replication")
            service.ready(f"{client.identity.name}, {machine}, of {config.control.config_server}")


def _run_owed_scripts(config: ControlledConfig, folder: str) -> None:
    app = config.app_consistency
    report = run_post_if_due(folder, app.post, app.script_seconds_max)
    if report is not None:
        structlog.get_logger().warning(
            "post scripts were owed and have run", trouble=report.reason or None
        )


class ControlledAgent:
    """Brings what runs to what is assigned, one step at a time."""

    def __init__(
        self,
        config: ControlledConfig,
        service: Service,
        client: ControlClient[MachineAssignment],
        measures: AgentMeasures,
    ) -> None:
        self._config = config
        self._service = service
        self._client = client
        self._measures = measures
        loop = asyncio.get_running_loop()

        def on_change() -> None:  # from whichever thread found it
            loop.call_soon_threadsafe(client.report_now)

        self._report_soon = on_change
        folder = machine_folder(config.state_folder, client.identity.node)
        self._final = FinalBook(folder, on_change, self._announce)
        self._host = read_host(config.control.bios_uuid)
        self._load = LoadMeter()
        self._started_ns = time.time_ns()
        self._software = importlib.metadata.version("understudy")
        self._wanted: MachineAssignment | None = None
        self._nudged = asyncio.Event()
        self._running: Running | None = None
        self._paths: tuple[str, ...] = ()
        self._moved = False
        self._is_missing = False
        self._status: AgentStatus | None = None
        self._failure = ""

    async def listen(self) -> None:
        """Take note of each assignment; ends when the client does."""
        async for assignment in self._client.assignments():
            if assignment.machine != self._client.identity.node:
                reason = f"assignment {assignment.version} is for {assignment.machine}, not for us"
                self._service.health.report("assignment", critical=reason)
                continue
            self._service.health.report("assignment")
            structlog.get_logger().info(
                "assignment",
                version=assignment.version,
                protected=assignment.protected,
                replicate=assignment.replicate,
                disks=len(assignment.disks),
            )
            await asyncio.to_thread(
                self._final.want, assignment.final, assignment.final_seconds_max
            )
            self._wanted = assignment
            self._nudged.set()

    async def drive(self) -> None:
        """Follow one assignment after the other until the service stops."""
        failures = 0
        while not self._service.stop.is_set():
            self._nudged.clear()
            self._moved = False
            began = time.monotonic()
            error = await self._attempt(self._wanted)
            if error is None:
                failures = 0
                continue
            if time.monotonic() - began > STEADY_SECONDS:
                failures = 0
            self._fail(str(error))
            structlog.get_logger().error(str(error.args[0]), code=error.code, hint=error.hint)
            await self._wait(min(RETRY_SECONDS_MAX, RETRY_SECONDS_MIN * 2**failures))
            failures = min(failures + 1, 10)

    async def _attempt(self, assignment: MachineAssignment | None) -> ReplicationError | None:
        """Follow ``assignment`` for as long as it is the one that counts."""
        found: list[ReplicationError] = []
        try:
            await self._follow(assignment)
        except* ReplicationError as group:
            found += _leaves(group)
        return found[0] if found else None

    async def _follow(self, assignment: MachineAssignment | None) -> None:
        if assignment is None:
            await self._wait()
        elif not assignment.protected:
            await self._forget(assignment)
            await self._wait()
        elif not assignment.replicate:
            await self._stand_still()
            await self._wait()
        else:
            await self._replicate(assignment)

    async def _forget(self, assignment: MachineAssignment) -> None:
        """Protection has ended, because the config server says so."""
        await asyncio.to_thread(forget, self._config.state_folder, assignment.machine)
        await asyncio.to_thread(self._final.clear)
        self._client.forget_data_key(assignment.machine)
        self._measures.status = self._status = None
        self._recover()
        AgentStatus.idle(
            self._config.state_folder,
            assignment.machine,
            assignment.name,
            tracker=self._config.tracker,
        ).write()
        self._client.report_now()

    async def _stand_still(self) -> None:
        """Nothing is sent; the kernel goes on tracking."""
        if (final := self._final.wanted) is not None and self._final.is_due:
            await asyncio.to_thread(self._final.fail, final.number, "nothing is replicated")
        if self._status is not None:
            self._status.enter(Phase.IDLE)
            self._status.write()
        self._recover()
        self._client.report_now()

    async def _replicate(self, assignment: MachineAssignment) -> None:
        """Replicate until another assignment counts, a disk has moved, or the service stops."""
        config = await self._run_config(assignment)
        stop = asyncio.Event()
        health = _PartsOf(self._service.health)
        run = asyncio.create_task(
            replicate(
                config,
                Service(stop, health, self._service.registry),
                on_running=self._on_running,
                order=self._order,
                final=self._final,
                server_unit=NodeRole.PROCESS_SERVER,
            ),
            name="run",
        )
        try:
            while not (run.done() or self._moved or self._is_other(assignment)):
                await self._wait(until=run)
                if self._service.stop.is_set():
                    break
                self._nudged.clear()
            stop.set()
            await run
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
            self._running = None
            health.withdraw()

    async def _run_config(self, assignment: MachineAssignment) -> AgentConfig:
        machine = assignment.machine
        await self._client.data_key(machine)
        devices = await asyncio.to_thread(read_devices, self._config)
        config = assigned_config(
            self._config,
            assignment,
            devices,
            tls=self._client.identity.tls,
            data_key_file=self._client.data_key_file(machine),
        )
        self._paths = tuple(disk.device for disk in config.disks)
        return config

    def _is_other(self, assignment: MachineAssignment) -> bool:
        """Whether the newest assignment asks for another run than ``assignment``."""
        return self._wanted is not None and _essence(self._wanted) != _essence(assignment)

    def _order(self) -> ResyncOrder:
        return self._wanted.resync if self._wanted is not None else ResyncOrder()

    def _on_running(self, running: Running) -> None:
        status = running.replicator.status
        if self._status is not None:
            status.carry_on(self._status)
        position = running.state.position
        if status.phase is Phase.IDLE and position.generation and position.stage is None:
            status.enter(Phase.REPLICATING if position.seeded else Phase.INITIAL)
        status.on_phase = self._report_soon
        self._running = running
        self._measures.status = self._status = status
        self._recover()
        self._client.report_now()

    def on_renewed(self, identity: NodeIdentity) -> None:
        """Show the new certificate from the next connection on."""
        if self._running is not None:
            self._running.client.renew(identity.tls)

    def _fail(self, reason: str) -> None:
        self._service.health.report(HEALTH_PART, critical=reason)
        if reason != self._failure:
            self._failure = reason
            self._client.report_now()
        if self._status is not None:
            self._status.enter(Phase.FAILED, reason=reason)
            self._status.write()

    def _recover(self) -> None:
        self._failure = ""
        self._service.health.report(HEALTH_PART)

    async def _wait(
        self, seconds: float | None = None, *, until: asyncio.Task[None] | None = None
    ) -> None:
        """Until something has happened, the service stops, ``until`` has ended, or time is over."""
        waits = [
            asyncio.create_task(self._nudged.wait()),
            asyncio.create_task(self._service.stop.wait()),
        ]
        ends = [*waits, until] if until is not None else waits
        try:
            await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def report(self) -> MachineReport:
        """What the config server is told now."""
        devices = await asyncio.to_thread(read_devices, self._config)
        self._look_for_moves(devices)
        situation = Situation(
            now_ns=time.time_ns(),
            started_ns=self._started_ns,
            software=self._software,
            assignment=self._client.version,
            host=self._host,
            devices=devices,
            load=self._load.read(),
            status=self._status,
            failure=self._failure,
            final=await self._final_told(),  # last: it is as of now
        )
        return machine_report(situation, self._service.health)

    async def _announce(self) -> None:
        """Report at once, also when the service stops."""
        with contextlib.suppress(ReplicationError, TimeoutError):
            async with asyncio.timeout(ANNOUNCE_SECONDS_MAX):
                await self._client.tell(await self.report())

    async def _final_told(self) -> FinalTold:
        """Nothing of an order that is not the one of the assignment which the report names."""
        newest, wanted = self._client.assignment, self._final.wanted
        if newest is None or wanted is None or newest.final != wanted.number:
            return NOTHING_TOLD
        return await asyncio.to_thread(self._final.told)

    def _look_for_moves(self, devices: Sequence[BlockDevice]) -> None:
        """A disk that is found under another path now needs a run that opens it there.

        One that was missing and has come is tried at once.
        """
        if self._wanted is None or not self._wanted.replicate:
            return
        found = [find(devices, disk.device) for disk in self._wanted.disks]
        was_missing, self._is_missing = self._is_missing, None in found
        if self._running is None:
            if was_missing and not self._is_missing:
                self._nudged.set()
            return
        paths = tuple(device.device for device in found if device is not None)
        if len(paths) == len(self._paths) == len(found) and paths != self._paths:
            structlog.get_logger().warning("disks have moved", before=self._paths, now=paths)
            self._moved = True
            self._nudged.set()


def _essence(assignment: MachineAssignment) -> MachineAssignment:
    """What of an assignment a run cannot take over while it goes on."""
    taken_over = {"version": 0, "resync": ResyncOrder(), "final": 0, "final_seconds_max": 300.0}
    return assignment.model_copy(update=taken_over)


def _leaves(group: BaseExceptionGroup[ReplicationError]) -> Iterator[ReplicationError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


class _PartsOf(Health):
    """The parts of a daemon's health that one run tells of; ``withdraw`` when it has ended."""

    def __init__(self, whole: Health) -> None:
        super().__init__(whole.warnings, whole.criticals)
        self._told: set[str] = set()

    def report(self, part: str, *, warning: str = "", critical: str = "") -> None:
        self._told.add(part)
        super().report(part, warning=warning, critical=critical)

    def withdraw(self) -> None:
        for part in self._told:
            super().report(part)


def assigned_paths(config: ControlledConfig) -> list[str]:
    """Paths of the disks of the assignment on disk, those that are here."""
    _, assignment = assignment_on_disk(config)
    if assignment is None:
        return []
    devices = read_devices(config)
    found = (find(devices, disk.device) for disk in assignment.disks)
    return [device.device for device in found if device is not None]
