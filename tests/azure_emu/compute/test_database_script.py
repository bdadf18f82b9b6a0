"""The lab's script on a database as a crash leaves it, in the recovery guest."""

# ruff: noqa: ASYNC221 - nothing else runs on this loop

import subprocess
from pathlib import Path

import pytest

from replication.control.recovery import VmPower
from tests.azure_emu.compute.site import MIB, Place, running
from vsphere_emu.workload.database import USER, Database

pytestmark = pytest.mark.timeout(900)
"""Emulated guests beside other tests take their time."""

SCRIPT = Path(__file__).parents[3] / "deploy" / "lab" / "opens_database.sh"


def crashed_database(folder: Path) -> tuple[Path, Path]:
    """Folders with data and write-ahead log of a server that was killed under load."""
    data, wal = folder / "data", folder / "wal"
    for place in (data, wal):
        place.mkdir(parents=True)
        place.chmod(0o755)
    with (folder / "server.log").open("wb") as log:
        database = Database(str(data), str(wal), log=log.fileno())
        try:
            database.make(1)
            database.start()
            load = database.client("pgbench", "-n", "-c", "2", "-t", "50", USER)
            subprocess.run(load, check=True, capture_output=True)
        finally:
            database.kill()
    return data, wal


async def test_postgresql_recovers_in_the_guest_and_its_sums_agree(place: Place) -> None:
    folders = crashed_database(place.folder / "database")
    disks = [place.point(f"disk{index}", 256 * MIB) for index in range(2)]
    for index, folder in enumerate(folders):
        image = place.points / f"disk{index}"
        command = ["mkfs.ext4", "-q", "-F", "-d", str(folder), str(image)]
        subprocess.run(command, check=True, capture_output=True)
    order = place.order(*disks, power=VmPower.ON, script=SCRIPT.read_text(), check_seconds_max=600)
    async with running(place) as site:
        await site.order(order)
        report = await site.until(order.id, lambda one: one.check is not None)
        assert report.check is not None
        assert report.check.passed, report.check
        assert "100 transactions" in report.check.output


@pytest.mark.parametrize("version", ["../../../mnt/disk0/evil", "15/../x", "", "15 16", "x"])
def test_a_version_that_is_no_number_leads_nowhere(tmp_path: Path, version: str) -> None:
    data, wal = tmp_path / "disk0" / "postgresql", tmp_path / "disk1" / "wal"
    for folder in (data, wal):
        folder.mkdir(parents=True)
    (data / "PG_VERSION").write_text(version + "\n")
    script = SCRIPT.read_text().replace("/mnt/", f"{tmp_path}/")
    ended = subprocess.run(["sh", "-c", script], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "disk 0 tells no version of PostgreSQL\n")
