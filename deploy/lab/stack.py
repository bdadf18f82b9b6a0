"""Bringing the lab's parts up and taking every trace of them away."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from agents.mobility.tracker.pins import remove_machine
from deploy.lab.control import Operator
from deploy.lab.layout import Layout, lab_guests
from deploy.lab.process import Background
from replication.errors import ReplicationError, StorageError, UnavailableError
from vsphere_emu.guest import Guest
from vsphere_emu.image.builder import cache_folder, default_recipe, ensure_image

AGENT_HEALTH_FIRST = 10


@dataclass(frozen=True, slots=True)
class AgentNews:
    """What an agent's status file says."""

    state: str
    trouble: str
    todo_bytes: int
    under_way_bytes: int
    changed_bytes: int
    sent_bytes: int
    durable_ns: int
    restorable_ns: int
    committed: str
    applied: str
    records: tuple[dict[str, object], ...]

    @property
    def seeded(self) -> bool:
        """The initial replication is done and a point can be restored."""
        return self.state == "replicating" and self.restorable_ns > 0


class Stack:
    """All parts of the lab in one folder."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.operator = Operator(layout)
        ports = layout.ports
        self.vsphere = Background(
            layout,
            "vsphere-emu",
            "vsphere_emu",
            layout.config("vsphere"),
            ports.health(3),
            arguments=("serve",),
        )
        self.config_server = Background(
            layout,
            "config-server",
            "appliance.config_server",
            layout.config("config-server"),
            ports.health(4),
        )
        self.azure = Background(
            layout, "azure-emu", "azure_emu", layout.config("azure"), ports.health(2)
        )
        self.process_server = Background(
            layout,
            "process-server",
            "appliance.process_server",
            layout.config("process-server"),
            ports.health(0),
        )
        self.applier = Background(
            layout, "applier", "appliance.applier", layout.config("applier"), ports.health(1)
        )

        self.compute = Background(
            layout, "compute", "azure_emu.compute", layout.config("compute"), ports.health(5)
        )

    def agent(self, name: str, index: int) -> Background:
        health = self.layout.ports.health(AGENT_HEALTH_FIRST + index)
        config = self.layout.config(f"agent-{name}")
        return Background(self.layout, f"agent-{name}", "agents.mobility", config, health)

    def agents(self) -> list[Background]:
        return [
            self.agent(guest.config.name, index) for index, guest in enumerate(self.layout.guests())
        ]

    def prepare(self, tell: Callable[[str], object]) -> list[Guest]:
        """The bootable image, folders and configuration; returns the guests, powered off or on.

        tell: hears of what takes long.
        """
        image = ensure_image(default_recipe(), cache_folder(), tell=tell)
        self.layout.make()
        self.layout.make_guests(lab_guests(image))
        return self.layout.guests()

    def start_control(self) -> None:
        """The vCenter of the lab, and the config server."""
        for part in (self.vsphere, self.config_server):
            part.start()
        for part in (self.vsphere, self.config_server):
            part.wait_ready()

    def start_second_site(self) -> None:
        """The cache storage account; process server, applier and compute node, which enrol."""
        self.azure.start()
        enrolled = (self.process_server, self.applier, self.compute)
        self.operator.enrol_all(enrolled)
        for part in enrolled:
            part.start()
        for part in (self.azure, *enrolled):
            part.wait_ready()

    def start_agents(self, guests: list[Guest]) -> None:
        """An agent for each guest, which enrols first."""
        for index, guest in enumerate(guests):
            self.layout.write_agent(guest, AGENT_HEALTH_FIRST + index)
        agents = self.agents()
        self.operator.enrol_all(agents)
        for agent in agents:
            agent.start()
        for agent in agents:
            agent.wait_ready()

    def news(self, guest: str) -> AgentNews | None:
        """What the guest's agent says of itself; None before it has said anything."""
        try:
            with open(self.layout.agent_status(guest), encoding="utf-8") as file:
                tree = json.load(file)
        except (OSError, ValueError):
            return None
        tree["records"] = tuple(tree["records"])
        return AgentNews(**{name: tree[name] for name in AgentNews.__slots__})

    def parts(self) -> list[Background]:
        parts = [
            self.vsphere,
            self.azure,
            self.config_server,
            self.process_server,
            self.applier,
            self.compute,
        ]
        with contextlib.suppress(ReplicationError):  # before the first `up` there are no guests
            parts += self.agents()
        return parts

    def check_alive(self) -> None:
        """Raise UnavailableError, with the end of its log, if a part has died."""
        for part in self.parts():
            if part.pid() is None:
                raise UnavailableError(
                    f"{part.name} has died: {part.log_tail()}", hint=f"see {part.log_path}"
                )

    def down(self) -> list[str]:
        """Remove every trace; returns what would not go, in words."""
        left = []
        parts = self.parts()
        for part in parts:
            part.ask_to_stop()
        for part in parts:
            part.wait_stopped()
        left += self._clear_compute()
        with contextlib.suppress(ReplicationError):
            for guest in self.layout.guests():
                try:
                    guest.remove_all_traces(delete_disks=True)
                    remove_machine(self.layout.machine_id(guest.config.name))
                except ReplicationError as error:
                    left.append(str(error))
        subprocess.run(
            ["fusermount3", "-uzq", self.layout.points], check=False, capture_output=True
        )
        if os.path.exists(self.layout.root) and not left:
            try:
                shutil.rmtree(self.layout.root)
            except OSError as error:
                left.append(f"{self.layout.root}: {error}")
        return left

    def _clear_compute(self) -> list[str]:
        """VMs outlive their compute node: take them away with it."""
        if not os.path.exists(self.compute.config):
            return []
        command = [sys.executable, "-m", self.compute.module, "--config", self.compute.config]
        done = subprocess.run([*command, "clear"], check=False, capture_output=True, text=True)
        return [f"virtual machines: {done.stderr.strip()}"] if done.returncode else []


@contextlib.contextmanager
def only_one(layout: Layout) -> Iterator[None]:
    """Two `lab up` at once would fight over the same guests."""
    os.makedirs(layout.root, mode=0o755, exist_ok=True)
    fd = os.open(f"{layout.root}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise StorageError(
            f"another `lab` command is at work in {layout.root}", hint="wait for it to end"
        ) from error
    try:
        yield
    finally:
        os.close(fd)


def wait_for(what: str, holds: object, seconds_max: float, tick_seconds: float = 0.25) -> None:
    """Wait until ``holds()`` is true; UnavailableError naming ``what`` when it does not come."""
    assert callable(holds)
    deadline = time.monotonic() + seconds_max
    while not holds():
        if time.monotonic() > deadline:
            raise UnavailableError(f"{what} did not come about within {seconds_max:.0f} s")
        time.sleep(tick_seconds)
