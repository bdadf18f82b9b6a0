"""``make lab-vm``: the source is a virtual machine with the agent inside, and so is what is proved.

The agent runs in the machine that it protects: its own kernel's eBPF tells what is written, its own
root file system is frozen for a point. A recovery point of it is then started beside it.
"""

import os
import time
from dataclasses import dataclass

from rich.console import Console

from deploy.lab.agent_disk import AgentDisk
from deploy.lab.layout import Layout
from deploy.lab.proof import Point, has_whole_log, list_points
from deploy.lab.stack import Stack, wait_for
from deploy.lab.virtual_machine import HOST_ADDRESS, Answer, Drive, VirtualMachine
from replication.control.enrolment import PassphraseKind
from replication.errors import IntegrityError
from vsphere_emu.image.builder import cache_folder, copy_image, default_recipe, ensure_image

MACHINE = "vm-01"
BOOT_SECONDS_MAX = 600.0
ENROL_SECONDS_MAX = 600.0
PROTECT_SECONDS_MAX = 600.0
INITIAL_SECONDS_MAX = 1800.0
CATCH_UP_SECONDS_MAX = 600.0
OS_SERIAL, AGENT_SERIAL = "os", "agent"
SOURCE_PROCESSORS = 2
_PORT_SOURCE, _PORT_POINT = 80, 81


@dataclass(frozen=True, slots=True)
class VmLab:
    """The virtual machines of a lab."""

    layout: Layout

    @property
    def folder(self) -> str:
        return self.layout.path("vm")

    def source(self) -> VirtualMachine:
        """The machine that is protected."""
        return VirtualMachine(
            folder=self.folder,
            name=MACHINE,
            drives=(
                Drive(os.path.join(self.folder, "os.img"), OS_SERIAL),
                Drive(os.path.join(self.folder, "agent.img"), AGENT_SERIAL),
            ),
            port=self.layout.ports.base + _PORT_SOURCE,
            uuid=str(self.layout.machine_id(MACHINE)),
            processors=SOURCE_PROCESSORS,
        )

    def of_point(self, point: Point) -> VirtualMachine:
        """A machine of a recovery point, which is read and never written."""
        return VirtualMachine(
            folder=self.folder,
            name=f"{MACHINE}-point",
            drives=(Drive(point.image(0), OS_SERIAL, throw_away=True),),
            port=self.layout.ports.base + _PORT_POINT,
            uuid=str(self.layout.machine_id(f"{MACHINE}-point")),
        )

    def stop(self) -> None:
        """Switch all of them off."""
        nowhere = Point("", 0, "", 0)
        for machine in (self.source(), self.of_point(nowhere)):
            machine.stop()


class VmStory:
    """One run from nothing, or from what an earlier run has left up."""

    def __init__(self, stack: Stack, console: Console) -> None:
        self._stack = stack
        self._layout = stack.layout
        self._console = console
        self._lab = VmLab(stack.layout)
        self._source = self._lab.source()

    def tell(self) -> None:
        """Run all of it; raises ReplicationError at the first thing that does not hold."""
        self._set_up()
        self._start_source()
        self._protect()
        point, seen = self._take_a_point()
        self._prove(point, seen)

    def _step(self, text: str) -> None:
        self._console.print(f"\n[bold]{text}[/bold]")

    def _done(self, text: str) -> None:
        self._console.print(f"  [green]✓[/green] {text}")

    def _set_up(self) -> None:
        self._step("1  Setting up")
        image = ensure_image(
            default_recipe(),
            cache_folder(),
            tell=lambda text: self._console.print(f"  … {text}"),
        )
        self._layout.make()
        os.makedirs(self._lab.folder, mode=0o755, exist_ok=True)
        self._stack.config_server.start()
        self._stack.config_server.wait_ready()
        self._stack.start_second_site()
        self._done("config server, cache storage account, process server, applier, enrolled")
        disk, agent_disk = (drive.path for drive in self._source.drives)
        if not os.path.exists(disk):
            copy_image(image, disk)
        if not os.path.exists(agent_disk):
            self._agent_disk().write(agent_disk)
        self._done(f"{MACHINE}: a disk with Debian, and one with the agent and what it needs")

    def _agent_disk(self) -> AgentDisk:
        ports = self._layout.ports
        config = (
            'state_folder = "/agent/state"\n\n'
            f'[control]\nconfig_server = "{self._layout.config_server_url}"\n'
            'identity_folder = "/agent/identity"\nreport_seconds = 2\n'
            f'machine = "{self._layout.machine_id(MACHINE)}"\n'
            f'devices = ["/dev/disk/by-id/virtio-{OS_SERIAL}"]\n\n'
            "[service]\nhealth_port = 9450\n"
        )
        return AgentDisk(
            name=MACHINE,
            config=config,
            passphrase=self._stack.operator.passphrase(PassphraseKind.MACHINES),
            host=HOST_ADDRESS,
            ports=(ports.config_server, ports.process_server),
        )

    def _start_source(self) -> None:
        self._step("2  The source boots; the agent inside it enrols")
        began = time.monotonic()
        self._source.start()
        start = self._source.wait_ready(BOOT_SECONDS_MAX)
        self._done(
            f"{MACHINE}: boot loader, kernel, login prompt, service after "
            f"{time.monotonic() - began:.0f} s; its start number {start.generation}"
        )
        wait_for(
            f"a report of the agent in {MACHINE}",
            lambda: self._stack.operator.machines().get(MACHINE, {}).get("hostname"),
            ENROL_SECONDS_MAX,
            tick_seconds=1.0,
        )
        self._done(f"its agent has enrolled, and reports, after {time.monotonic() - began:.0f} s")

    def _protect(self) -> None:
        self._step("3  Protect; initial replication of the disk that it runs from")
        began = time.monotonic()
        self._stack.operator.set_policy()
        self._stack.operator.protect([MACHINE], PROTECT_SECONDS_MAX)
        wait_for(
            f"a recovery point of {MACHINE}",
            lambda: list_points(self._layout, MACHINE),
            INITIAL_SECONDS_MAX,
            tick_seconds=1.0,
        )
        self._done(f"the first recovery point is there after {time.monotonic() - began:.0f} s")

    def _take_a_point(self) -> tuple[Point, Answer]:
        self._step("4  The machine goes on; a point of it as it is now")
        seen = self._source.ask()
        since_ns, began = time.time_ns(), time.monotonic()
        found: list[Point] = []

        def has_come() -> bool:
            found[:] = [
                point
                for point in list_points(self._layout, MACHINE)
                if point.time_ns > since_ns and point.consistency != "none"
            ]
            return bool(found)

        wait_for(f"a newer recovery point of {MACHINE}", has_come, CATCH_UP_SECONDS_MAX)
        point = found[0]
        self._done(
            f"[cyan]{point.name}[/cyan] {point.consistency}, restorable after "
            f"{time.monotonic() - began:.1f} s; its service had written up to {seen.counter}"
        )
        return point, seen

    def _prove(self, point: Point, seen: Answer) -> None:
        self._step("5  Proof: the point is started, beside its source")
        machine = self._lab.of_point(point)
        began = time.monotonic()
        machine.start()
        try:
            start = machine.wait_ready(BOOT_SECONDS_MAX)
            up_seconds = time.monotonic() - began
            answer = machine.ask()
        finally:
            machine.stop()
        if start.generation != seen.generation + 1 or start.counter < seen.counter:
            raise IntegrityError(
                f"the machine of {point.name} is at start {start.generation}, number "
                f"{start.counter}; the source was at {seen.generation} and {seen.counter}"
            )
        self._done(
            f"it boots to its login prompt in {up_seconds:.0f} s; its service answers, at number "
            f"{answer.counter}, in start number {answer.generation}"
        )
        last = has_whole_log(self._layout, point.image(0))
        self._done(f"its file system is clean, its log whole up to {last}")
        later = self._source.ask()
        if later.generation != seen.generation or later.counter <= seen.counter:
            raise IntegrityError(f"the source did not go on: {later}, before {seen}")
        self._done(f"the source has gone on meanwhile, up to {later.counter}")
