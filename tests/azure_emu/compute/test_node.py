"""VMs on real QEMU, few boots: each looks at all that one boot can show."""

# ruff: noqa: ASYNC221 - nothing else runs on this loop

import asyncio
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from azure_emu.compute import carry_out, confine, evidence, monitor
from azure_emu.compute.launch import CONSOLE
from azure_emu.compute.record import VmRecord
from replication.control.recovery import (
    EvidenceKind,
    GuestChoice,
    SourceDisk,
    VmPower,
    VmReport,
    VmState,
)
from replication.errors import ConfigError
from tests.azure_emu.compute.site import MIB, SECONDS_MAX, Place, files_of, running

pytestmark = pytest.mark.timeout(900)
"""Emulated guests beside other tests take their time."""

SCRIPT = """set -e
(while :; do sleep 1; done) &
ls /mnt
cat /mnt/disk0/hello
cat /sys/devices/system/clocksource/clocksource0/current_clocksource >/dev/ttyS0
echo changed >/mnt/disk0/hello
head -c 20000000 /dev/zero
echo the end
exit 7
"""
BOOT_CODE = bytes.fromhex(
    "fc31c08ed8be1e7c"  # cld; ds = 0; si = the text
    "ac84c0741188c4bafd03eca82074fb88e0b2f8eeebea"  # each byte to the serial port, when it is free
)
"""Fits the text's place: see `own_disk`."""


def made(path: Path, *command: str) -> None:
    subprocess.run([*command, path], check=True, capture_output=True)


def recovery_disks(place: Place, files: Path) -> list[SourceDisk]:
    """ext4, XFS, btrfs, an MBR with a partition, and an ext4 that is broken."""
    files.mkdir()
    (files / "hello").write_text("hello from the point\n")
    disks = [
        place.point("disk0", 64 * MIB),
        place.point("disk1", 320 * MIB),
        place.point("disk2", 128 * MIB),
        place.point("disk3", 64 * MIB),
        place.point("disk4", 32 * MIB),
    ]
    made(place.points / "disk0", "mkfs.ext4", "-q", "-F", "-d", str(files))
    made(place.points / "disk1", "mkfs.xfs", "-q")
    made(place.points / "disk2", "mkfs.btrfs", "-q")
    made(place.points / "disk3", "mkfs.ext4", "-q", "-F", "-E", "offset=1048576")
    with (place.points / "disk3").open("r+b") as file:
        entry = bytes(4) + b"\x83" + bytes(3) + (2048).to_bytes(4, "little")
        entry = bytes([0]) + entry[1:] + (63 * 2048 - 2048).to_bytes(4, "little")
        file.seek(446)
        file.write(entry.ljust(64, b"\0") + b"\x55\xaa")
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-E", "offset=1048576", place.points / "disk3", "62M"],
        check=True,
        capture_output=True,
    )
    made(place.points / "disk4", "mkfs.ext4", "-q", "-F")
    made(place.points / "disk4", "debugfs", "-w", "-R", "clri <2>")
    return disks


def answered(report: VmReport) -> bool:
    return report.check is not None


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not holds():  # noqa: ASYNC110 - a file, which tells nobody
            await asyncio.sleep(0.02)


async def test_one_boot_of_the_recovery_guest_finds_everything(place: Place) -> None:
    disks = recovery_disks(place, place.folder / "files")
    before = {disk.source: (place.points / disk.source).stat().st_mtime_ns for disk in disks}
    order = place.order(*disks, power=VmPower.ON, script=SCRIPT)
    async with running(place) as site:
        await site.order(order)
        report = await site.until(order.id, answered)
        check = report.check
        assert check is not None
        assert report.state is VmState.FAILED
        assert report.guest == "recovery"
        assert report.address == "10.90.0.2"
        found = {(one.disk, one.kind, one.clean) for one in check.file_systems}
        assert found == {
            (0, "ext4", True),
            (1, "xfs", True),
            (2, "btrfs", True),
            (3, "ext4", True),
            (4, "ext4", False),
        }
        assert [one.device for one in check.file_systems if one.disk == 3] == ["/dev/vdd1"]
        assert all(one.used_bytes > 0 for one in check.file_systems if one.clean)
        broken = next(one for one in check.file_systems if one.disk == 4)
        assert broken.detail in check.detail or broken.detail[-100:] in check.detail
        # It wrote 20 MB and left something running: the end is here, and all of it has ended.
        assert check.script_exit == 7
        assert check.output.endswith("\\0\\0the end")
        assert len(check.output) <= 2000
        await site.until(order.id, lambda _: len(site.evidence) == 2)
        console = site.evidence[order.id, EvidenceKind.CONSOLE]
        assert b"the script begins" in console
        assert b"/dev/vda (disk 0) ext4 clean=true" in console
        assert re.search(rb"^(hpet|kvm-clock)\r?$", console, re.MULTILINE), "a TSC may run ahead"
        assert site.evidence[order.id, EvidenceKind.SCREENSHOT].startswith(b"\x89PNG")
        (process,) = place.processes(order.id)
        its_own = {"diskN.qcow2", CONSOLE, "qemu.pid", "qemu.log"}
        for name in files_of(process, writable=True) - {"/dev/null", "/dev/net/tun"}:
            assert Path(name).parent == place.vm_folder(order.id)
            assert re.sub(r"disk\d", "diskN", Path(name).name) in its_own
        status = await asyncio.to_thread(Path(f"/proc/{process}/status").read_text)
        assert re.findall(r"^Cap\w+:\t0+$", status, re.MULTILINE) == [
            f"Cap{name}:\t{0:016x}" for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")
        ]
        assert "NoNewPrivs:\t1" in status

        # What is written goes to the overlay; the point is as it was.
        for source, changed in before.items():
            assert (place.points / source).stat().st_mtime_ns == changed
        await site.order(removed=(order.id,))
        await site.until_removed(order.id)
    assert place.processes(order.id) == []
    assert place.left_namespaces() == []
    assert list((place.data / "vms").iterdir()) == []
    assert list((place.data / "networks").iterdir()) == []


def own_disk(place: Place, text: bytes) -> SourceDisk:
    """A disk whose boot sector writes ``text`` to the serial port, and halts."""
    disk = place.point("disk0", 4 * MIB)
    loop = BOOT_CODE + b"\xf4\xeb\xfd"  # hlt, again and again
    sector = bytearray(loop.ljust(446, b"\0"))
    at = sector.index(bytes.fromhex("be1e7c"))
    start = len(loop)
    sector[at + 1 : at + 3] = (0x7C00 + start).to_bytes(2, "little")
    sector[start : start + len(text) + 1] = text + b"\0"
    entry = b"\x80" + bytes(3) + b"\x83" + bytes(3) + (8).to_bytes(4, "little") * 2
    with (place.points / "disk0").open("r+b") as file:
        file.write(bytes(sector) + entry.ljust(64, b"\0") + b"\x55\xaa")
    return disk


async def test_a_script_that_hangs_is_ended_in_time(place: Place) -> None:
    order = place.order(power=VmPower.ON, script="echo begins; sleep 9999", check_seconds_max=12)
    async with running(place) as site:
        await site.order(order)
        report = await site.until(order.id, answered)
        assert report.check is not None
        assert report.check.script_exit == 137, report
        assert report.check.detail == "the script did not end in time"
        assert report.check.output.startswith("begins")


async def test_a_disk_that_boots_is_up_at_its_login_prompt(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carry_out, "SHUT_DOWN_SECONDS_MAX", 1.0)  # nothing there hears the button
    order = place.order(
        own_disk(place, b"\r\nweb-01 login: "), power=VmPower.DISKS, script="exit 1"
    )
    async with running(place) as site:
        await site.order(order)
        report = await site.until(order.id, lambda one: one.state is VmState.DISKS_READY)
        assert report.disks_ready_ns
        assert report.disks_seconds < 10
        assert place.processes(order.id) == []
        on = order.model_copy(update={"power": VmPower.ON})
        await site.order(on)
        report = await site.until(order.id, lambda one: one.state is VmState.UP)
        assert report.guest == "own"
        assert report.up_ns > report.started_ns > report.disks_ready_ns
        assert report.check is not None
        assert "the script was not run" in report.check.detail

        # Its process is killed: to the guest, a power failure; it is up again by itself.
        (process,) = place.processes(order.id)
        subprocess.run(["kill", "-9", str(process)], check=True)
        report = await site.until(
            order.id,
            lambda one: (
                one.state is VmState.UP and place.processes(order.id) not in ([], [process])
            ),
        )
        first_up = report.up_ns
        await site.until(order.id, lambda one: one.state is VmState.UP and one.up_ns == first_up)

        # Off, and made to stand alone while nobody uses it.
        off = order.model_copy(update={"power": VmPower.OFF, "independent": True})
        off = off.model_copy(update={"guest": GuestChoice.RECOVERY})
        await site.order(off)
        report = await site.until(order.id, lambda one: one.independent)
        assert report.state is VmState.STOPPED
        assert report.independent_share == 1.0
        assert (report.started_ns, report.check, report.guest) == (0, None, "")
        (place.points / "disk0").unlink()
        await site.order(off.model_copy(update={"power": VmPower.DISKS}))
        await site.until(order.id, lambda one: one.state is VmState.DISKS_READY)
        await site.order(removed=(order.id,))
        await site.until_removed(order.id)


async def test_a_vm_stands_on_what_was_ordered_whatever_its_file_says(place: Place) -> None:
    """The file was written anew, as by whoever broke out."""
    disk = own_disk(place, b"\r\nother login: ")
    (place.points / "disk0").rename(place.points / "other")
    disk = own_disk(place, b"\r\nweb-01 login: ")
    order = place.order(disk, guest=GuestChoice.OWN)
    async with running(place) as site:
        await site.order(order)
        await site.until(order.id, lambda one: one.state is VmState.DISKS_READY)
        image = place.vm_folder(order.id) / "disk0.qcow2"
        rebase = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b"]
        subprocess.run([*rebase, place.points / "other", image], check=True)
        await site.order(order.model_copy(update={"power": VmPower.ON}))
        await site.until(order.id, lambda one: one.state is VmState.UP)
        console = (place.vm_folder(order.id) / CONSOLE).read_bytes()
        assert b"web-01 login" in console
        assert b"other" not in console


async def test_a_kernel_without_landlock_is_refused_or_told(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confine, "_CREATE_RULESET", 9999)  # which no kernel has
    with pytest.raises(ExceptionGroup) as raised:
        async with running(place):
            pass
    assert raised.group_contains(ConfigError, match="no Landlock")
    place.config = place.config.model_copy(update={"landlock": "optional"})
    async with running(place) as site:
        assert "no Landlock" in site.service.health.warnings["confinement"]


async def test_a_guest_that_is_silent_fails_in_time_and_says_so(place: Place) -> None:
    order = place.order(own_disk(place, b"panic"), power=VmPower.ON, check_seconds_max=2)
    async with running(place) as site:
        await site.order(order)
        report = await site.until(order.id, lambda one: one.state is VmState.FAILED)
        assert "no answer within 2 s" in report.reason
        assert report.check is not None
        assert not report.check.passed
        assert report.up_ns == 0
        await site.until(order.id, lambda _: len(site.evidence) == 2)
        assert b"panic" in site.evidence[order.id, EvidenceKind.CONSOLE]


@pytest.mark.parametrize("removed", [False, True])
async def test_a_process_whose_monitor_is_silent_is_ended(
    place: Place, monkeypatch: pytest.MonkeyPatch, *, removed: bool
) -> None:
    order = place.order(own_disk(place, b"\r\nweb-01 login: "), power=VmPower.ON)
    async with running(place) as site:
        await site.order(order)
        await site.until(order.id, lambda one: one.state is VmState.UP)
        await site.until(order.id, lambda _: len(site.evidence) == 2)
        monkeypatch.setattr(monitor, "CALL_SECONDS_MAX", 0.5)
        (process,) = place.processes(order.id)
        subprocess.run(["kill", "-STOP", str(process)], check=True)
        if removed:
            await site.order(removed=(order.id,))
            await site.until_removed(order.id)
        else:
            await site.order(order.model_copy(update={"power": VmPower.OFF}))
            await site.until(order.id, lambda one: one.state is VmState.STOPPED)
        assert place.processes(order.id) == []


async def test_a_console_is_bounded_while_the_guest_has_not_answered(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "CONSOLE_BYTES_MAX", 1 << 10)
    monkeypatch.setattr(evidence, "EVIDENCE_BYTES_MAX", 1 << 9)
    order = place.order(own_disk(place, b"\r\nno prompt"), power=VmPower.ON)
    async with running(place) as site:
        await site.order(order)
        await site.until(order.id, lambda _: bool(place.processes(order.id)))
        console = place.vm_folder(order.id) / CONSOLE
        with console.open("ab") as file:
            file.write(b"x" * (1 << 20))
        await until(lambda: console.stat().st_size < 1 << 10)
        report = await site.report(order.id)
        assert report is not None
        assert report.check is None


async def test_an_answer_that_came_while_nobody_looked_counts(place: Place) -> None:
    order = place.order(
        own_disk(place, b"\r\nweb-01 login: "), power=VmPower.ON, check_seconds_max=1
    )
    async with running(place) as site:
        await site.order(order)
        await site.until(order.id, lambda _: bool(place.processes(order.id)))
    record = place.vm_folder(order.id) / "vm.json"
    started = VmRecord.model_validate_json(record.read_bytes())
    record.write_text(
        started.model_copy(update={"started_ns": 1, "check": None, "failed": ""}).model_dump_json()
    )
    console = place.vm_folder(order.id) / CONSOLE
    await until(lambda: b"login: " in console.read_bytes())
    async with running(place) as site:
        report = await site.until(order.id, lambda one: one.check is not None)
        assert report.check is not None
        assert report.check.passed


async def test_what_can_never_be_is_a_failure_that_a_newer_order_ends(place: Place) -> None:
    disk = place.point("disk0", 4 * MIB)
    outside = disk.model_copy(update={"source": "../secret"})
    order = place.order(outside)
    async with running(place) as site:
        await site.order(order)
        report = await site.until(order.id, lambda one: one.state is VmState.FAILED)
        assert "is not below" in report.reason
        await site.order(order.model_copy(update={"disks": (disk,)}))
        await site.until(order.id, lambda one: one.state is VmState.DISKS_READY)
        await site.order(order.model_copy(update={"disks": (disk,), "memory_bytes": 1 << 40}))
        large = order.model_copy(
            update={"disks": (disk,), "memory_bytes": 1 << 40, "power": VmPower.ON}
        )
        await site.order(large)
        report = await site.until(order.id, lambda one: one.state is VmState.FAILED)
        assert "all VMs together may have" in report.reason


async def test_a_missing_point_is_waited_for(place: Place) -> None:
    disk = SourceDisk(index=0, name="d", size_bytes=MIB, source="late")
    order = place.order(disk)
    async with running(place) as site:
        await site.order(order)
        report = await site.until(order.id, lambda one: bool(one.reason))
        assert report.state is VmState.PREPARING
        assert "No such file" in report.reason
        place.point("late", MIB)
        await site.until(order.id, lambda one: one.state is VmState.DISKS_READY)


async def test_a_vm_that_is_not_named_is_left_alone(place: Place) -> None:
    order = place.order(place.point("disk0", MIB))
    async with running(place) as site:
        await site.order(order)
        await site.until(order.id, lambda one: one.state is VmState.DISKS_READY)
        await site.order()
        assert await site.report(order.id) is not None
    async with running(place) as site:
        report = await site.until(order.id, lambda one: one.state is VmState.DISKS_READY)
        assert report.disks_ready_ns
