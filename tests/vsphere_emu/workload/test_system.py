import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.errors import IntegrityError
from tests.vsphere_emu.conftest import MakeGuest
from vsphere_emu.check import check_file_system
from vsphere_emu.image.recipe import LOG_BYTES_MAX, SERVICE_FOLDER
from vsphere_emu.workload.pace import Pace
from vsphere_emu.workload.system import LogReport, System, check_log

MIB = 1 << 20


class Steps(Pace):
    """A pace of so many steps, at once."""

    def __init__(self, count: int) -> None:
        super().__init__(1.0)
        self.left = count

    def next(self) -> bool:
        self.left -= 1
        return self.left >= 0


def log_of(root: Path) -> Path:
    return root / SERVICE_FOLDER.lstrip("/") / "log"


def work(root: Path, steps: int) -> None:
    System(str(root)).run(Steps(steps))


def test_numbers_go_on_where_the_log_ends(tmp_path: Path) -> None:
    work(tmp_path, 5)
    assert check_log(str(tmp_path)) == LogReport(last=5, lines=5)
    work(tmp_path, 3)
    assert check_log(str(tmp_path)) == LogReport(last=8, lines=8)
    assert [path.name[:6] for path in log_of(tmp_path).parent.glob("state-*")] != []


def test_torn_last_line_is_ended_and_its_number_written_again(tmp_path: Path) -> None:
    work(tmp_path, 12)
    log = log_of(tmp_path)
    log.write_bytes(log.read_bytes()[:-4])  # 12 ti
    assert check_log(str(tmp_path)).last == 11
    work(tmp_path, 1)
    assert log.read_bytes().endswith(b"\n11 tick\n12 tick\n")


def test_log_is_bounded_and_checked_over_its_two_files(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.parent.mkdir(parents=True)
    line = "1000000 tick\n"
    count = LOG_BYTES_MAX // len(line) + 1
    log.write_text("".join(f"{number} tick\n" for number in range(1_000_000, 1_000_000 + count)))
    work(tmp_path, 2)
    assert log.read_text() == f"{1_000_000 + count} tick\n{1_000_001 + count} tick\n"
    assert check_log(str(tmp_path)) == LogReport(last=1_000_001 + count, lines=count + 2)


def test_lost_number_is_found(tmp_path: Path) -> None:
    work(tmp_path, 3)
    log = log_of(tmp_path)
    log.write_bytes(log.read_bytes().replace(b"2 tick\n", b""))
    with pytest.raises(IntegrityError, match="from number 1 to 3"):
        check_log(str(tmp_path))


@given(written=st.integers(1, 300), torn=st.integers(0, 2000))
def test_wherever_a_power_cut_tears_the_log_no_number_is_lost_or_made_up(
    tmp_path_factory: pytest.TempPathFactory, written: int, torn: int
) -> None:
    root = tmp_path_factory.mktemp("root")
    log = log_of(root)
    log.parent.mkdir(parents=True)
    whole = b"".join(b"%d tick\n" % number for number in range(1, written + 1))
    log.write_bytes(whole[: len(whole) - min(torn, len(whole))])
    lines = log.read_bytes().count(b"\n")
    assert check_log(str(root)) == LogReport(last=lines, lines=lines)
    System(str(root)).run(Steps(2))
    assert check_log(str(root)) == LogReport(last=lines + 2, lines=lines + 2)


def test_copy_of_a_running_machines_disk_is_whole(
    make_guest: MakeGuest, parted_image: Path, tmp_path: Path
) -> None:
    """A copy at a frozen moment, as a recovery point is: journal replayed, checked, log whole."""
    disk = {
        "name": "os",
        "size_bytes": 32 * MIB,
        "file_system": "ext4",
        "image": str(parted_image),
    }
    workload = {"kind": "system", "disk": "os", "writes_per_second": 400}
    guest = make_guest(name="boot-01", disks=[disk], workload=workload)
    guest.power_on()
    assert guest.start_workload()
    root = f"{guest.folder}/os"
    deadline = time.monotonic() + 20
    while check_log(root).last < 20:
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
    copy = str(tmp_path / "copy.img")
    subprocess.run(["fsfreeze", "--freeze", root], check=True)
    try:
        # what the loop device was given lies in the image's own page cache
        subprocess.run(
            ["cp", "--sparse=always", guest.status().disks[0].flat_path, copy], check=True
        )
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", root], check=True)
    seen: list[LogReport] = []
    report = check_file_system(copy, str(tmp_path), lambda point: seen.append(check_log(point)))
    assert report.file_system == "ext4"
    assert seen[0].last >= 20
    guest.power_off()
    assert not os.path.ismount(root)
