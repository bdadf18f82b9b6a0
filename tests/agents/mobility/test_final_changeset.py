"""A final changeset on real file systems, under real load."""

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from agents.mobility.final_order import FINAL_FILE
from replication.bookmark import Consistency
from replication.control.report import MachineReport, Phase
from replication.watermark import Repair, RepairRun
from tests.agents.mobility.acknowledged import acknowledged, newest_of, writing
from tests.agents.mobility.capture_rig import SIZES, Mount, mounter
from tests.agents.mobility.conftest import LoopDisk, MakeLoopDisk
from tests.agents.mobility.control_rig import ControlRig, control_rig, losetup
from tests.agents.mobility.control_server import SecondSite

MIB = 1 << 20
STANDS_STILL_SECONDS = 0.4


class Scene:
    """A protected machine with an ext4 and an XFS, replicated and written to."""

    def __init__(self, rig: ControlRig, folders: list[Path], note: Path) -> None:
        self.rig, self.folders, self.note = rig, folders, note

    @property
    def acknowledged(self) -> int:
        return acknowledged(self.note)

    async def goes_on(self) -> None:
        before = self.acknowledged
        await self.rig.until("writers go on", lambda: self.acknowledged > before + 2)

    async def stands_still(self) -> int:
        before = self.acknowledged
        await asyncio.sleep(STANDS_STILL_SECONDS)
        assert self.acknowledged == before, self.rig.told()
        return before

    async def held(self, number: int = 1, **changes: float) -> MachineReport:
        self.rig.control.assign(final=number, **changes)
        return await self.rig.reported("it is held", lambda told: told.final == number)

    async def not_held(self, reason: str) -> MachineReport:
        report = await self.rig.reported("not held", lambda told: told.final_reason)
        assert report.final == report.final_generation == report.final_number == 0
        assert reason in report.final_reason, report.final_reason
        return report

    def site_holds(self, tmp_path: Path) -> int:
        return records_at(self.rig.site, tmp_path)


def records_at(site: SecondSite, folder: Path) -> int:
    """The newest record of the second site's disks, started as after a power cut."""
    with contextlib.ExitStack() as stack:
        points = []
        for index, image in site.images.items():
            path, point = folder / f"site{index}.img", folder / f"site{index}"
            path.write_bytes(image)
            point.mkdir(exist_ok=True)
            options = "loop,nouuid" if image[:4] == b"XFSB" else "loop"
            subprocess.run(["mount", "-o", options, str(path), str(point)], check=True)
            stack.callback(subprocess.run, ["umount", str(point)], check=True)
            points.append(point)
        return newest_of(points)


@pytest.fixture
async def rig(tmp_path: Path, loop_disk: MakeLoopDisk) -> AsyncIterator[ControlRig]:
    """Enrolled and told nothing yet; ends before the loop devices do."""
    async with control_rig(tmp_path) as made:
        await made.enrol()
        yield made


@pytest.fixture
def mount(
    tmp_path: Path,
    opened: contextlib.ExitStack,
    loop_disk: MakeLoopDisk,  # must outlive the mounts
) -> Mount:
    return mounter(tmp_path, opened)


@pytest.fixture
async def scene(
    rig: ControlRig, mount: Mount, loop_disk: MakeLoopDisk, tmp_path: Path
) -> AsyncIterator[Scene]:
    loops = [loop_disk(SIZES[kind]) for kind in ("ext4", "xfs")]
    folders = [mount(loop, kind) for loop, kind in zip(loops, ("ext4", "xfs"), strict=True)]
    rig.protect(*loops)
    rig.start()
    await rig.reported("it replicates", lambda told: told.phase is Phase.REPLICATING)
    note = tmp_path / "note"
    try:
        with writing(note, *folders), thawed_at_the_end(folders):
            made = Scene(rig, folders, note)
            await made.goes_on()
            yield made
    finally:
        rig.kill()


@contextlib.contextmanager
def thawed_at_the_end(folders: list[Path]) -> Iterator[None]:
    try:
        yield
    finally:
        for folder in folders:
            subprocess.run(["fsfreeze", "-u", str(folder)], check=False, capture_output=True)


def thaw(folder: Path) -> None:
    subprocess.run(["fsfreeze", "-u", str(folder)], check=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True)


def freezer_pid(agent: int) -> int:
    for name in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            fields = (name / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == agent and b"freezer.py" in (name / "cmdline").read_bytes():
                return int(name.name)
    raise AssertionError("the agent has no freezer")


async def test_every_acknowledged_record_is_in_it_and_none_comes_after(
    scene: Scene, tmp_path: Path
) -> None:
    report = await scene.held(7)
    acknowledged_then = await scene.stands_still()
    newest = scene.rig.site.manifests[-1]
    assert (report.final_generation, report.final_number) == (
        newest.stamp.generation,
        newest.stamp.number,
    )
    assert newest.bookmark.consistency is Consistency.CRASH
    assert scene.site_holds(tmp_path) >= acknowledged_then
    assert scene.rig.site.manifests[-1] == newest
    scene.rig.control.assign(final=0)
    await scene.goes_on()
    report = await scene.rig.reported("none is held", lambda told: told.final == 0)
    assert not report.final_reason
    await scene.held(8)
    assert scene.site_holds(tmp_path) >= await scene.stands_still()
    assert {manifest.stamp.generation for manifest in scene.rig.site.manifests} == {1}
    scene.rig.control.assign(final=9)  # another order: it is carried out anew
    report = await scene.rig.reported("the next is held", lambda told: told.final == 9)
    assert scene.site_holds(tmp_path) >= await scene.stands_still()
    await scene.rig.stop()
    assert "the agent stops" in scene.rig.newest.final_reason, "it says so before it thaws"
    assert scene.rig.newest.final == 0
    await scene.goes_on()
    scene.rig.start()
    await scene.not_held("the agent stops")


async def test_whatever_ends_the_hold_is_told_and_writers_go_on(scene: Scene) -> None:
    rig = scene.rig
    begun = rig.state / str(rig.machine) / FINAL_FILE
    rig.site.refuse_commits(begun.exists)
    rig.control.assign(final=1, final_seconds_max=1.5)
    await scene.not_held("before the process server had acknowledged")
    await scene.goes_on()
    rig.site.refuse_commits(lambda: False)

    rig.control.assign(final=2, final_seconds_max=1.0)
    await scene.not_held("the time limit of 1 s has passed")
    await scene.goes_on()

    await scene.held(3, final_seconds_max=60.0)
    os.kill(freezer_pid(rig.pid), signal.SIGKILL)
    await scene.not_held("is gone")
    await scene.goes_on()

    await scene.held(4)
    thaw(scene.folders[0])
    await scene.not_held("someone else thawed it")
    await scene.goes_on()

    await scene.held(5)
    rig.kill()
    await scene.goes_on()
    rig.start()
    await scene.not_held("the agent ended")
    sent = len(rig.site.manifests)
    await rig.until("it replicates", lambda: len(rig.site.manifests) > sent + 1)
    assert rig.newest.final == 0
    await scene.held(6)
    assert {manifest.stamp.generation for manifest in rig.site.manifests} == {1}


@contextlib.contextmanager
def raw_load(loop: LoopDisk) -> Iterator[Callable[[], None]]:
    """Somebody writes to a raw disk all the while; ends when told."""
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            loop.write([number % 64], bytes([number % 255 + 1]))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield stop.set
    finally:
        stop.set()
        thread.join(20)


async def test_raw_disk_must_have_stood_still(rig: ControlRig, loop_disk: MakeLoopDisk) -> None:
    loop = loop_disk(4 * MIB)
    rig.protect(loop)
    rig.start()
    await rig.reported("it replicates", lambda told: told.phase is Phase.REPLICATING)
    with raw_load(loop):
        rig.control.assign(final=1)
        report = await rig.reported("refused", lambda told: told.final_reason)
        assert report.final == 0
        # The second where the writer was not let run for a moment, on a busy machine.
        assert report.final_reason.startswith(("no instant at which", "disk0 was written to after"))
    rig.control.assign(final=2)
    report = await rig.reported("it is held", lambda told: told.final == 2)
    assert report.final_number == rig.site.manifests[-1].stamp.number
    await rig.replicated(disk0=loop)
    loop.write([5], b"z")
    report = await rig.reported("a write ends it", lambda told: told.final_reason)
    assert report.final == 0
    assert "was written to after the final changeset" in report.final_reason
    await rig.stop()


async def test_blocks_that_the_second_site_asks_for_are_in_it(
    rig: ControlRig, loop_disk: MakeLoopDisk
) -> None:
    """Asked for a moment before the order: nobody could send them after the last changeset."""
    loop = loop_disk(4 * MIB)
    loop.write([5], b"s")
    rig.configure(str(loop.image))
    config = rig.config.read_text()
    rig.config.write_text(config.replace("heartbeat_seconds = 0.5", "heartbeat_seconds = 600"))
    rig.site.repair = Repair()
    rig.protect(loop)
    rig.start()
    await rig.reported("it replicates", lambda told: told.phase is Phase.REPLICATING)
    await rig.replicated(disk0=loop)
    rig.site.images[0][5 * 4096 : 6 * 4096] = bytes(4096)  # rotten there
    rig.site.repair = Repair(1, (RepairRun(0, 5, 1),))
    rig.control.assign(final=1)
    report = await rig.reported("it is held", lambda told: told.final == 1)
    newest = rig.site.manifests[-1]
    assert (report.final_number, newest.repaired) == (newest.stamp.number, 1)
    assert bytes(rig.site.images[0]) == loop.image.read_bytes()
    await rig.stop()


async def test_disk_that_is_detached_is_let_go_and_found_again(
    rig: ControlRig, mount: Mount, loop_disk: MakeLoopDisk
) -> None:
    loop = loop_disk(SIZES["ext4"])
    folder = mount(loop, "ext4")
    rig.protect(loop)
    rig.start()
    await rig.reported("it replicates", lambda told: told.phase is Phase.REPLICATING)
    rig.control.assign(final=1)
    await rig.reported("it is held", lambda told: told.final == 1)
    losetup("-d", loop.path)
    report = await rig.reported("it tells", lambda told: told.final_reason)
    assert "is being detached" in report.final_reason
    unmount(folder)
    await rig.until("the loop device is free", lambda: str(loop.image) not in losetup("-a"))
    await rig.reported("it tells again", lambda told: "is not on this machine" in told.reason)
    other = loop_disk(MIB)  # takes the old number
    loop.path = losetup("-f", "--show", str(loop.image))
    assert other.path != loop.path
    report = await rig.reported("a resync", lambda told: told.cause is not None)
    assert report.phase in (Phase.RESYNC_REQUIRED, Phase.RESYNCHRONISING)
    rig.control.assign(final=2)
    report = await rig.reported("refused", lambda told: told.assignment == 3 and told.final_reason)
    assert "does not have the machine's whole state" in report.final_reason
    await rig.stop()
