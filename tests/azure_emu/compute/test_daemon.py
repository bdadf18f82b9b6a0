"""The daemon killed at every step: afterwards there is one process per VM, and all ends right."""

import asyncio
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from replication.control.assignment import ComputeAssignment
from replication.control.recovery import VirtualMachineOrder, VmPower, VmReport, VmState
from replication.control.report import ComputeReport
from replication.control.role import NodeRole
from tests.appliance.orders import Orders
from tests.azure_emu.compute.site import MIB, SECONDS_MAX, Place
from tests.preloaded import Forked, start_daemon

pytestmark = pytest.mark.timeout(900)
"""Emulated guests beside other tests take their time."""

STOP_SECONDS_MAX = 60


class Daemon:
    """``understudy-compute`` as a process, and its config server."""

    def __init__(self, place: Place, orders: Orders) -> None:
        self.place = place
        self.orders = orders
        self.node = uuid.uuid4()
        identity = place.folder / "identity"
        orders.identity(identity, NodeRole.COMPUTE, self.node)
        self.config = place.folder / "compute.toml"
        self.config.write_text(
            f"""
points_folder = "{place.points}"
data_folder = "{place.data}"
accelerator = "tcg"
network = {{ namespaces = "{place.namespaces}" }}
[control]
config_server = "{orders.url}"
identity_folder = "{identity}"
report_seconds = 1
wait_seconds = 1
"""
        )
        self._process: Forked | None = None
        self._version = 0

    def start(self) -> None:
        self.orders.reports.clear()
        with (self.place.folder / "daemon.log").open("ab") as log:
            self._process = start_daemon(
                "azure_emu.compute", "--config", str(self.config), log_fd=log.fileno()
            )

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        return self._process.wait(STOP_SECONDS_MAX)

    async def order(
        self, *orders: VirtualMachineOrder, removed: tuple[uuid.UUID, ...] = ()
    ) -> None:
        self._version += 1
        assignment = ComputeAssignment(version=self._version, vms=orders, removed=removed)
        await self.orders.assign(self.node, assignment)

    @property
    def report(self) -> ComputeReport | None:
        told = self.orders.reports.get(self.node)
        return None if told is None else ComputeReport.model_validate(told)

    async def until(self, what: str, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS_MAX
        while not holds():
            assert self._process is not None
            log = (self.place.folder / "daemon.log").read_text()[-3000:]
            assert self._process.poll() is None, log
            assert time.monotonic() < deadline, (what, self.report, log)
            await asyncio.sleep(0.02)

    async def until_vm(self, what: str, holds: Callable[[VmReport], bool]) -> VmReport:
        found: list[VmReport] = []

        def seen() -> bool:
            report = self.report
            found[:] = [one for one in report.vms if holds(one)] if report else []
            return bool(found)

        await self.until(what, seen)
        return found[0]


@pytest.fixture
async def daemon(place: Place) -> AsyncIterator[Daemon]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    async with Orders(place.folder / "config-server", port) as orders:
        daemon = Daemon(place, orders)
        try:
            yield daemon
        finally:
            daemon.end()


async def test_whenever_the_daemon_is_killed_there_is_one_process_and_all_ends_right(
    daemon: Daemon, place: Place
) -> None:
    disk = place.point("disk0", 4096 * MIB)
    await make_ext4(place.points / "disk0")
    order = place.order(disk, script="echo here", check_seconds_max=200)
    vm = order.id

    # Between disks and start.
    await daemon.order(order)
    daemon.start()
    made = await daemon.until_vm("disks", lambda one: one.state is VmState.DISKS_READY)
    assert made.disks_seconds < 10
    assert daemon.end() == -signal.SIGKILL
    assert place.processes(vm) == []

    # While the guest boots.
    on = order.model_copy(update={"power": VmPower.ON})
    await daemon.order(on)
    daemon.start()
    await daemon.until("a process", lambda: place.processes(vm))
    daemon.end()
    daemon.start()
    up = await daemon.until_vm("up", lambda one: one.state is VmState.UP)
    assert up.disks_ready_ns == made.disks_ready_ns
    assert up.check is not None
    assert up.check.output == "here"
    (process,) = place.processes(vm)
    await daemon.until("evidence", lambda: len(daemon.orders.evidence) == 2)

    # While it runs, in good order: the VM does not notice.
    assert daemon.end(signal.SIGTERM) == 0
    assert place.processes(vm) == [process]
    free = on.model_copy(update={"independent": True})
    await daemon.order(free)
    daemon.start()

    # While its disk is copied.
    told = await daemon.until_vm(
        "the copy", lambda one: one.independent or one.independent_share > 0
    )
    assert told.up_ns == up.up_ns
    daemon.end()
    daemon.start()
    told = await daemon.until_vm("a disk of its own", lambda one: one.independent)
    assert told.state is VmState.UP
    assert place.processes(vm) == [process]

    # While it is removed.
    await daemon.order(removed=(vm,))
    record = place.vm_folder(vm) / "vm.json"
    await daemon.until(
        "the removal",
        lambda: not record.exists() or '"removing":true' in record.read_text(),
    )
    daemon.end()
    daemon.start()
    await daemon.until("removed", lambda: daemon.report and vm in daemon.report.removed)
    assert daemon.end(signal.SIGTERM) == 0
    assert place.processes(vm) == []
    assert place.left_namespaces() == []
    assert list((place.data / "vms").iterdir()) == []


async def test_another_daemon_on_the_same_folder_is_refused(daemon: Daemon, place: Place) -> None:
    daemon.start()
    await daemon.until("a report", lambda: daemon.report)
    second = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "azure_emu.compute",
        "--config",
        str(daemon.config),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await second.communicate()
    assert second.returncode == 2
    assert b"in use by another compute node" in said
    assert daemon.end(signal.SIGTERM) == 0


async def make_ext4(path: Path) -> None:
    process = await asyncio.create_subprocess_exec("mkfs.ext4", "-q", "-F", path)
    assert await process.wait() == 0
