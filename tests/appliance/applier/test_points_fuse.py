import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from appliance.applier.points_fuse import export
from appliance.applier.store.point_names import point_name
from appliance.applier.store.reader_store import machine_folder
from tests.appliance.applier.store.recorded_machine import (
    BLOCK,
    MACHINE,
    SECOND_NS,
    START_NS,
    RecordedMachine,
)

SERVE = """
import sys
from appliance.applier.points_fuse import serve_points
serve_points(*sys.argv[1:3], for_root=len(sys.argv) > 3)
"""
AS_NOBODY = [
    *("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"),
    *("--inh-caps", "+sys_admin,+dac_override", "--ambient-caps", "+sys_admin,+dac_override", "--"),
]
"""As the applier's unit is with points.conf, and with the right to reach this test's folders."""


class Mount:
    """Points of a store, mounted by a process of their own."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str, before: Sequence[str] = ()) -> None:
        command = [*before, sys.executable, "-c", SERVE, str(self.root), str(self.folder), *options]
        self.process = subprocess.Popen(command)
        until = time.monotonic() + 20
        while not is_served(self.folder):
            assert self.process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)

    def end(self, signum: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(signum)
        return self.process.wait(10)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        subprocess.run(["fusermount3", "-uz", str(self.folder)], check=False, capture_output=True)


def is_served(folder: Path) -> bool:
    try:
        return os.path.ismount(folder) and os.listdir(folder) is not None
    except OSError:
        return False


@pytest.fixture
def machine(tmp_path: Path) -> RecordedMachine:
    return RecordedMachine(str(tmp_path / "store"), sizes=(700, 33))


@pytest.fixture
def mount(tmp_path: Path, machine: RecordedMachine) -> Iterator[Mount]:
    with machine.open() as store:
        for _ in range(6):
            machine.apply(store, writes=40)
    made = Mount(tmp_path / "store", tmp_path / "points")
    try:
        yield made
    finally:
        made.close()


def points_of(mount: Mount) -> dict[int, Path]:
    folders = (mount.folder / "web-01").iterdir()
    return {int(f.name.rpartition("-")[2]): f for f in folders if f.name != "latest"}


def test_every_file_equals_its_image(mount: Mount, machine: RecordedMachine) -> None:
    mount.start()
    points = points_of(mount)
    assert sorted(points) == [1, 2, 3, 4, 5, 6]
    for position, folder in points.items():
        assert sorted(os.listdir(folder)) == ["disk0.img", "disk1.img", "point.json"]
        for disk, image in machine.images[position].items():
            assert (folder / f"disk{disk}.img").read_bytes() == image
        said = json.loads((folder / "point.json").read_text())
        assert (said["position"], said["machine"]) == (position, str(MACHINE))
        assert said["consistency"] == "crash"
    latest = mount.folder / "web-01" / "latest"
    assert latest.resolve() == points[6]
    assert (latest / "disk1.img").stat().st_size == 33 * BLOCK
    newest_ns = points[6].stat().st_mtime_ns
    assert newest_ns > points[1].stat().st_mtime_ns > 0
    assert latest.lstat().st_mtime_ns == (mount.folder / "web-01").stat().st_mtime_ns == newest_ns
    assert abs(mount.folder.stat().st_mtime - time.time()) < 300


def test_a_machine_is_found_by_its_id_whatever_it_is_called(
    mount: Mount, machine: RecordedMachine
) -> None:
    mount.start()
    by_id = mount.folder / str(MACHINE)
    assert os.listdir(mount.folder) == ["web-01"]
    assert sorted(os.listdir(by_id)) == sorted(os.listdir(mount.folder / "web-01"))
    name = points_of(mount)[6].name
    with machine.open() as store, (by_id / name / "disk0.img").open("rb") as reading:
        head = reading.read(BLOCK)
        store.rename(str(uuid.UUID(int=9)))  # the id of another one takes nobody in
        until = time.monotonic() + 20
        while os.listdir(mount.folder) != [str(MACHINE)]:
            assert time.monotonic() < until
        assert not (mount.folder / str(uuid.UUID(int=9))).exists()
        assert head + reading.read() == machine.images[6][0]
        assert (by_id / name / "disk1.img").read_bytes() == machine.images[6][1]
        position = machine.apply(store)
        (newest,) = [point_name(p) for p in store.points() if p.position == position]
        # Right after the listing that does not have it yet.
        assert (by_id / newest / "disk1.img").read_bytes() == machine.images[position][1]


def test_nothing_can_be_written(mount: Mount) -> None:
    mount.start()
    disk = points_of(mount)[3] / "disk0.img"
    for flags in (os.O_RDWR, os.O_WRONLY):
        with pytest.raises(OSError):
            os.open(disk, flags)
    with pytest.raises(OSError):
        (mount.folder / "new").mkdir()
    assert not (mount.folder / "web-02").exists()


def test_files_stay_right_while_layers_are_merged_and_folded(
    mount: Mount, machine: RecordedMachine
) -> None:
    mount.start()
    with machine.open() as store, (points_of(mount)[4] / "disk0.img").open("rb") as file:
        half = file.read(200 * BLOCK)
        store.merge(2, 5)
        store.fold_to(1)
        machine.apply(store)
        assert half + file.read() == machine.images[4][0]
        time.sleep(1.1)  # listings are kept for a second
        points = points_of(mount)
        assert sorted(points) == [1, 5, 6, 7]
        for position, folder in points.items():
            assert (folder / "disk0.img").read_bytes() == machine.images[position][0]


def test_a_store_that_was_begun_anew_shows_nothing_of_the_one_before(
    mount: Mount, machine: RecordedMachine
) -> None:
    mount.start()
    for folder in points_of(mount).values():
        assert (folder / "disk0.img").read_bytes()  # the kernel keeps these pages
    shutil.rmtree(machine_folder(machine.root, MACHINE))
    anew = RecordedMachine(machine.root, seed=2, sizes=(700, 33))
    with anew.open() as store:
        for number in range(6):
            anew.apply(store, time_ns=START_NS + (10_000 + number) * SECOND_NS)
    time.sleep(1.1)  # listings are kept for a second
    points = points_of(mount)
    assert sorted(points) == [1, 2, 3, 4, 5, 6]
    for position, folder in points.items():
        assert (folder / "disk0.img").read_bytes() == anew.images[position][0]


def test_a_rotten_block_is_an_io_error_and_others_are_served(
    mount: Mount, machine: RecordedMachine
) -> None:
    with machine.open() as store:
        store.fold_to(6)
        image = machine.images[6][0]
        rotten = next(n for n in range(300, 700) if any(image[n * BLOCK : (n + 1) * BLOCK]))
        with Path(store.folder, "disks/0/base.img").open("r+b") as base:
            base.seek(rotten * BLOCK)
            base.write(b"rot")
    mount.start()
    fd = os.open(points_of(mount)[6] / "disk0.img", os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        with pytest.raises(OSError, match="Input/output"):
            os.pread(fd, BLOCK, rotten * BLOCK)
        assert os.pread(fd, BLOCK, 0) == image[:BLOCK]
    finally:
        os.close(fd)


def test_sigterm_unmounts_and_a_killed_mount_is_replaced(
    mount: Mount, machine: RecordedMachine
) -> None:
    mount.start()
    assert mount.end(signal.SIGTERM) == 0
    assert not os.path.ismount(mount.folder)
    mount.start()
    assert os.stat(mount.folder)
    mount.end(signal.SIGKILL)
    mount.start()
    assert (points_of(mount)[2] / "disk1.img").read_bytes() == machine.images[2][1]
    assert Path("/proc/mounts").read_text().count(f" {mount.folder} ") == 1


def test_root_reads_what_another_user_serves_if_that_is_said_and_nobody_else_does(
    mount: Mount, machine: RecordedMachine
) -> None:
    mount.start("for root", before=AS_NOBODY)
    path = points_of(mount)[2] / "disk1.img"
    assert path.read_bytes() == machine.images[2][1]
    other = ["setpriv", "--reuid", "4321", "--clear-groups", "--inh-caps", "+dac_read_search"]
    other += ["--ambient-caps", "+dac_read_search", "--", "cat", str(path)]
    done = subprocess.run(other, check=False, capture_output=True, text=True)
    assert "Permission denied" in done.stderr
    assert mount.end(signal.SIGTERM) == 0


def test_export_keeps_holes(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path / "store"), sizes=(50_000,))
    told: list[tuple[int, int]] = []
    with machine.open() as store:
        machine.apply(store)
        output = tmp_path / "disk.img"
        with store.open_view(1, 0) as view:
            data_bytes = export(view, str(output), lambda *at: told.append(at))
    assert output.read_bytes() == machine.images[1][0]
    assert 0 < data_bytes <= 12 * 9 * BLOCK
    assert output.stat().st_blocks * 512 <= data_bytes + 16 * BLOCK
    assert told[-1] == (50_000 * BLOCK, 50_000 * BLOCK)
    assert os.listdir(tmp_path) == ["store", "disk.img"] or len(os.listdir(tmp_path)) == 2
