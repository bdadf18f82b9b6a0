"""The agent's unit gives it few capabilities and a read-only tree: what it does works with them."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agents.mobility.freeze import thaw_all
from agents.mobility.tracker.pins import remove_machine

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "understudy-agent.service"
IMAGE_BYTES = 64 << 20

IN_NAMESPACE = """
set -e
mount --make-rslave /
mount -o remount,bind,ro "$1"
if touch "$1/file" 2>/dev/null; then echo "not read-only"; exit 1; fi
shift
exec setpriv --inh-caps=-all --no-new-privs "$@"
"""
"""As ProtectSystem=strict: file systems of the host, read-only for the process alone."""

PROBE = """
import sys, uuid
from agents.mobility.device import Device
from agents.mobility.freeze import Freezer, sync_file_systems
from agents.mobility.mounts import mounted_file_systems
from agents.mobility.tracker.ebpf import EbpfTracker

device = Device.open(sys.argv[1])
tracker = EbpfTracker.attach(uuid.UUID(sys.argv[2]), 0, device)
tracker.swap()
tracker.forget()
places = [found.mount_point for found in mounted_file_systems(device) if not found.read_only]
sync_file_systems(places)
with Freezer() as freezer:
    freezer.freeze(places, 5)
    held = freezer.thaw().held
tracker.swap()
tracker.close()
print(len(places), held)
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A loop device and where its file system is mounted."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    device = subprocess.run(
        ["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True
    ).stdout.strip()
    place = tmp_path / "mounted"
    place.mkdir()
    try:
        subprocess.run(["mount", device, str(place)], check=True)
        try:
            yield device, place
        finally:
            thaw_all([str(place)])
            subprocess.run(["umount", str(place)], check=False)
    finally:
        subprocess.run(["losetup", "-d", device], check=False)


@pytest.fixture
def machine() -> Iterator[str]:
    made = uuid.uuid4()
    try:
        yield str(made)
    finally:
        remove_machine(made)


def capabilities() -> list[str]:
    found = re.search(r"^CapabilityBoundingSet=(.+)$", UNIT.read_text(), re.MULTILINE)
    assert found
    return [name.removeprefix("CAP_").lower() for name in found[1].split()]


def probe(
    disk: tuple[str, Path], machine: str, allowed: list[str]
) -> subprocess.CompletedProcess[str]:
    bounding = ",".join(["-all", *(f"+{name}" for name in allowed)])
    return subprocess.run(
        [
            *("unshare", "--mount", "bash", "-c", IN_NAMESPACE, "probe", str(disk[1])),
            *(f"--bounding-set={bounding}", sys.executable, "-c", PROBE, disk[0], machine),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_tracking_and_freezing_work_in_a_read_only_tree_with_the_units_capabilities(
    disk: tuple[str, Path], machine: str
) -> None:
    # A host that has itself given up a capability cannot hand it on; the bounding set is a limit.
    done = probe(disk, machine, capabilities())
    assert (done.returncode, done.stdout.strip()) == (0, "1 True"), done.stderr


@pytest.mark.parametrize("missing", ["sys_admin"])
def test_units_capabilities_are_needed(disk: tuple[str, Path], machine: str, missing: str) -> None:
    allowed = [name for name in capabilities() if name != missing]
    assert len(allowed) == len(capabilities()) - 1
    done = probe(disk, machine, allowed)
    assert done.returncode == 1
    assert "Error" in done.stderr
