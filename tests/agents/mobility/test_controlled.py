"""The agent as a process that follows a config server."""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from replication.control.report import Phase, ResyncCause
from tests.agents.mobility.conftest import LoopDisk, MakeLoopDisk
from tests.agents.mobility.control_rig import ControlRig, control_rig, losetup
from tests.agents.mobility.control_server import disk

MIB = 1 << 20


@pytest.fixture
async def rig(tmp_path: Path, loop_disk: MakeLoopDisk) -> AsyncIterator[ControlRig]:
    """Enrolled and told nothing yet; ends before the loop devices do."""
    async with control_rig(tmp_path) as made:
        await made.enrol()
        yield made


@contextlib.contextmanager
def load(loop: LoopDisk) -> Iterator[None]:
    """Somebody writes all the while."""
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.wait(0.01):
            number += 1
            loop.write([number % 64], bytes([number % 255 + 1]))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)


async def test_machine_that_is_not_protected_only_tells_of_itself(
    rig: ControlRig, loop_disk: MakeLoopDisk
) -> None:
    shown, hidden = loop_disk(MIB), loop_disk(2 * MIB)
    rig.configure(str(shown.image))
    rig.start()
    report = await rig.reported("a report", lambda _: True)
    assert (report.phase, str(report.bios_uuid)) == (
        Phase.IDLE,
        "420c8f5e-2b1a-9d3c-7e4f-001122334455",
    )
    assert [(device.id, device.device) for device in report.devices] == [
        (str(shown.image), shown.path)
    ]
    assert hidden.path not in report.model_dump_json()
    assert report.kernel == os.uname().release
    assert report.load.memory_bytes > 0
    rig.control.assign(name="db")
    await rig.reported("the assignment is followed", lambda told: told.assignment == 1)
    assert not rig.pins.exists()
    assert rig.control.keys_given == 0
    await rig.stop()


async def test_agent_goes_on_without_the_config_server_also_after_a_kill(
    rig: ControlRig, loop_disk: MakeLoopDisk
) -> None:
    loop = loop_disk(8 * MIB)
    loop.write(range(32), b"a")
    rig.protect(loop)
    rig.start()
    await rig.reported("it replicates", lambda told: told.phase is Phase.REPLICATING)
    await rig.control.listener.go_away()
    rig.kill()
    loop.write([40, 41], b"b")
    rig.start()
    await rig.replicated(disk0=loop)
    sent = len(rig.site.manifests)
    loop.write([50], b"c")
    await rig.replicated(disk0=loop)
    assert {manifest.stamp.generation for manifest in rig.site.manifests} == {1}
    assert sum(manifest.changed_bytes for manifest in rig.site.manifests[sent:]) < MIB
    assert rig.control.keys_given == 1
    await rig.control.listener.start()
    report = await rig.reported("it is heard again", lambda told: told.durable_ns > 0)
    assert (report.phase, report.generation) == (Phase.REPLICATING, 1)
    await rig.stop()


async def test_disks_come_and_go_under_load_and_nothing_is_sent_twice(
    rig: ControlRig, loop_disk: MakeLoopDisk
) -> None:
    second_bytes = 8 * MIB
    first, second = loop_disk(16 * MIB), loop_disk(second_bytes)
    for loop in (first, second):
        loop.write(range(256, 1024), b"x")
    rig.protect(first)
    rig.start()
    with load(first):
        await rig.reported("it replicates", lambda told: told.phase is Phase.REPLICATING)
        sent = len(rig.site.manifests)
        rig.protect(first, second)
        await rig.until("a second disk", lambda: 1 in rig.site.images)
        rig.kill()
        rig.start()
        await rig.replicated(disk1=second)
    await rig.replicated(disk0=first, disk1=second)
    later = rig.site.manifests[sent:]
    assert {manifest.stamp.generation for manifest in later} == {1}
    assert not any(manifest.resync or manifest.initial for manifest in later)
    assert sum(manifest.changed_bytes for manifest in later) < second_bytes + 4 * MIB
    assert (rig.pins / "0").exists()
    rig.control.assign(disks=(disk(1, second.path),))
    await rig.until("one disk", lambda: list(rig.site.images) == [1])
    second.write([5], b"z")
    await rig.replicated(disk1=second)
    rig.control.assign(interval_seconds=0.3)
    await rig.until("tracking of the other ends", lambda: not (rig.pins / "0").exists())
    assert rig.site.manifests[-1].stamp.generation == 1
    await rig.stop()


async def test_end_of_protection_is_not_believed_before_the_config_server_says_it(
    rig: ControlRig, loop_disk: MakeLoopDisk
) -> None:
    loop = loop_disk(4 * MIB)
    rig.protect(loop)
    rig.start()
    await rig.reported("it replicates", lambda told: told.phase is Phase.REPLICATING)
    await rig.control.listener.go_away()
    rig.control.assign(protected=False, replicate=False)
    rig.kill()
    rig.start()
    loop.write([7], b"y")
    await rig.replicated(disk0=loop)
    assert rig.pins.exists()
    await rig.control.listener.start()
    await rig.reported("it is idle", lambda told: told.assignment == 2 and told.phase is Phase.IDLE)
    await rig.until("tracking ends", lambda: not rig.pins.exists())
    folder = rig.state / str(rig.machine)
    assert not (folder / "stream.state").exists()
    assert not (folder / "retained").exists()
    assert not list((rig.identity / "data-keys").iterdir())
    rig.kill()
    rig.start()
    await rig.reported("it is idle again", lambda told: told.phase is Phase.IDLE)
    rig.protect(loop)
    await rig.reported("it is protected anew", lambda told: told.generation > 0)
    assert rig.control.keys_given == 2
    await rig.stop()


@pytest.mark.parametrize("left", ["", '{"version": 1, "machine": "', "{}"])
async def test_damaged_assignment_ends_nothing(
    left: str, rig: ControlRig, loop_disk: MakeLoopDisk
) -> None:
    loop = loop_disk(4 * MIB)
    rig.protect(loop)
    rig.start()
    await rig.reported("it replicates", lambda told: told.phase is Phase.REPLICATING)
    rig.kill()
    (rig.identity / "assignment.json").write_text(left)
    (rig.identity / "assignment.json.0badf00d.new").write_text("half")
    await rig.control.listener.go_away()
    rig.start()
    await rig.until("it runs", lambda: rig.log.read_text().count("] ready ") >= 3)
    assert rig.pins.exists()
    await rig.control.listener.start()
    loop.write([7], b"y")
    await rig.replicated(disk0=loop)
    assert {manifest.stamp.generation for manifest in rig.site.manifests} == {1}
    await rig.stop()


async def test_disk_that_is_missing_fails_and_recovers_when_it_comes(
    rig: ControlRig, loop_disk: MakeLoopDisk
) -> None:
    loop = loop_disk(4 * MIB)
    loop.detach()
    rig.protect(loop)
    rig.start()
    report = await rig.reported("it fails", lambda told: told.phase is Phase.FAILED)
    assert "is not on this machine" in report.reason
    assert ("replication", "critical") in [
        (trouble.part, trouble.severity) for trouble in report.troubles
    ]
    loop.path = losetup("-f", "--show", str(loop.image))
    report = await rig.reported("it recovers", lambda told: told.phase is Phase.REPLICATING)
    assert not [trouble for trouble in report.troubles if trouble.part == "replication"]
    await rig.stop()


async def test_disk_that_grew_needs_a_resync(rig: ControlRig, loop_disk: MakeLoopDisk) -> None:
    loop = loop_disk(4 * MIB)
    rig.protect(loop)
    rig.start()
    await rig.reported("it replicates", lambda told: told.phase is Phase.REPLICATING)
    os.truncate(loop.image, 6 * MIB)
    losetup("-c", loop.path)
    report = await rig.reported("the cause", lambda told: told.cause is ResyncCause.DISK_RESIZED)
    assert report.phase in (Phase.RESYNC_REQUIRED, Phase.RESYNCHRONISING)
    assert "was resized" in report.reason
    await rig.stop()


async def test_pause_sends_nothing_and_goes_on_tracking(
    rig: ControlRig, loop_disk: MakeLoopDisk
) -> None:
    loop = loop_disk(4 * MIB)
    rig.protect(loop)
    rig.start()
    await rig.reported("it replicates", lambda told: told.phase is Phase.REPLICATING)
    rig.control.assign(replicate=False)
    await rig.reported("it stands still", lambda told: told.phase is Phase.IDLE)
    sent = len(rig.site.manifests)
    loop.write([3], b"w")
    await asyncio.sleep(1)
    assert len(rig.site.manifests) == sent
    assert rig.pins.exists()
    rig.control.assign(replicate=True)
    await rig.replicated(disk0=loop)
    assert {manifest.stamp.generation for manifest in rig.site.manifests} == {1}
    await rig.stop()
