"""A planned failover at the source: a final changeset, then a power cut."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from replication.control.report import Phase
from tests.agents.mobility.acknowledged import acknowledged, command, newest_of
from tests.agents.mobility.control_rig import ControlRig, control_rig
from tests.agents.mobility.control_server import disk
from tests.agents.mobility.test_final_changeset import records_at
from vsphere_emu.config import GuestConfig
from vsphere_emu.datastore import Datastore
from vsphere_emu.guest import Guest
from vsphere_emu.workload import life

MIB = 1 << 20
DISKS = [
    {"name": "data", "size_bytes": 48 * MIB, "file_system": "ext4"},
    {"name": "log", "size_bytes": 320 * MIB, "file_system": "xfs"},
]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[ControlRig]:
    async with control_rig(tmp_path) as made:
        await made.enrol()
        yield made


@contextlib.asynccontextmanager
async def guest_at_work(folder: Path, note: Path) -> AsyncIterator[Guest]:
    """A guest of the emulator whose workload notes what it knows to be safe."""
    config = GuestConfig.model_validate({"name": "db-01", "disks": DISKS})
    guest = Guest(config, Datastore("datastore1", str(folder / "store")), str(folder / "root"))
    try:
        guest.power_on()
        points = [Path(guest.mount_point(one)) for one in config.disks]
        lock = guest.lock_path
        life.start(command(note, points, lock), lock, guest.log_path)
        yield guest
    finally:
        await asyncio.to_thread(guest.remove_all_traces, delete_disks=True)


async def test_power_cut_after_a_final_changeset_loses_nothing(
    rig: ControlRig, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    async with guest_at_work(tmp_path, note) as guest:
        flats = [Path(one.flat_path) for one in guest.status().disks]
        disks = tuple(disk(index, flat) for index, flat in enumerate(flats))
        rig.protect()
        rig.control.assign(disks=disks)
        rig.start()
        await rig.reported("it replicates", lambda told: told.phase is Phase.REPLICATING)
        before = acknowledged(note)
        await rig.until("writers work", lambda: acknowledged(note) > before + 5)
        rig.control.assign(final=1)
        report = await rig.reported("it is held", lambda told: told.final == 1)
        final = rig.site.manifests[-1]
        assert (final.stamp.generation, final.stamp.number) == (
            report.final_generation,
            report.final_number,
        )
        safe = acknowledged(note)
        held_since = len(rig.control.reports)
        await asyncio.to_thread(guest.cut_power)
        assert acknowledged(note) == safe, "a write was acknowledged after the freeze"
        assert safe <= records_at(rig.site, tmp_path)
        for index, flat in enumerate(flats):
            assert flat.read_bytes() == rig.site.images[index], "a disk was written to afterwards"
        await rig.reported("it tells", lambda told: "is not on this machine" in told.reason)
        assert rig.site.manifests[-1] == final
        told = {(one.final, one.final_reason) for one in rig.control.reports[held_since:]}
        assert told == {(1, "")}, "the machine is off, and nothing was written before it was"

        await asyncio.to_thread(guest.power_on)
        mounts = [Path(guest.mount_point(one)) for one in guest.config.disks]
        assert newest_of(mounts) >= safe
        report = await rig.reported("a resync", lambda told: told.cause is not None)
        assert report.phase in (Phase.RESYNC_REQUIRED, Phase.RESYNCHRONISING)
        assert (report.final, report.final_reason) == (0, "the machine's disks have come back")
    await rig.stop()
