"""What differs from the source, and what rots in the store, is found and mended by the source."""

import asyncio
import os
import threading
from collections.abc import Collection, Sequence

import pytest

from appliance.applier import keeping
from appliance.applier.arrivals import Arrivals
from appliance.applier.store import ReaderStore
from replication.block_set import BLOCK_BYTES
from replication.bookmark import Consistency, Stamp
from replication.checksum import CHUNK_BLOCKS
from replication.manifest import AuditDigest
from replication.watermark import RepairRun
from tests.appliance.applier.running import Site, until
from tests.appliance.applier.source import Changeset, Source, a_source

QUICK_SCRUB = {"scrub_bytes_per_second": 1 << 30}


def bypass(source: Source, disk: int, block: int) -> None:
    """Write a block so that no tracker sees it."""
    at = block * BLOCK_BYTES
    source.disks[disk][at : at + BLOCK_BYTES] = source.random.randbytes(BLOCK_BYTES)


async def send(site: Site, source: Source, **how: object) -> Changeset:
    changeset = source.changeset(**how)  # type: ignore[arg-type]
    await changeset.put(site.account)
    await site.until_applied(source, changeset.stamp)
    return changeset


async def test_block_that_differs_is_found_by_the_audit_and_repaired(any_site: Site) -> None:
    source = a_source()
    async with any_site.applier(source) as service:
        await send(any_site, source)
        bypass(source, 0, 37)
        source.write(1, 3, bytes(BLOCK_BYTES))
        await send(any_site, source, audit=[(0, 0), (0, 2), (1, 0)])
        watermark = await any_site.until(source, lambda found: found.repair.request == 1)
        assert watermark.repair.runs == (RepairRun(0, 2 * CHUNK_BLOCKS, CHUNK_BLOCKS),)
        await until(lambda: "need repair" in str(service.health.warnings))
        assert '"code":"differs"' in any_site.events(source)
        source.touch(0, range(2 * CHUNK_BLOCKS, 3 * CHUNK_BLOCKS))
        repaired = await send(any_site, source, audit=[(0, 2)], repaired=1)
        watermark = await any_site.until(source, lambda found: not found.repair.runs)
        assert watermark.repair.request == 1
        await until(lambda: service.health.state == "normal")
    any_site.check(source, repaired)


async def test_last_short_chunk_is_audited_as_the_source_does(site: Site) -> None:
    source = a_source(5 * (64 << 10) + 5 * BLOCK_BYTES + 512)
    async with site.applier(source):
        await send(site, source, audit=[(0, chunk) for chunk in range(6)])
        bypass(source, 0, 84)
        source.write(0, 0, b"x" * BLOCK_BYTES)
        await send(site, source, audit=[(0, chunk) for chunk in range(6)])
        watermark = await site.until(source, lambda found: found.repair.request == 1)
        assert watermark.repair.runs == (RepairRun(0, 80, 6),)


async def test_sample_of_an_inconsistent_changeset_accuses_nobody(site: Site) -> None:
    source = a_source()
    async with site.applier(source):
        await send(site, source)
        bypass(source, 0, 1)
        await send(site, source, audit=[(0, 0)], consistency=Consistency.NONE)
        await send(site, source, audit=[(0, 0)], initial=True)
        await send(site, source, audit=[(0, 1)])
    assert site.events(source) == ""


async def test_open_requests_outlive_the_applier_and_are_asked_anew(site: Site) -> None:
    source = a_source()
    async with site.applier(source):
        await send(site, source)
        bypass(source, 0, 0)
        await send(site, source, audit=[(0, 0)])
        before = await site.until(source, lambda found: found.repair.request == 1)
    async with site.applier(source):
        after = await site.until(source, lambda found: found.repair.request == 2)
        assert after.repair.runs == before.repair.runs
        source.touch(0, range(CHUNK_BLOCKS))
        repaired = await send(site, source, audit=[(0, 0)], repaired=2)
        await site.until(source, lambda found: not found.repair.runs)
    site.check(source, repaired)


async def test_repair_that_was_not_one_is_asked_for_again(site: Site) -> None:
    source = a_source()
    async with site.applier(source):
        await send(site, source)
        bypass(source, 0, 0)
        await send(site, source, audit=[(0, 0)])
        await site.until(source, lambda found: found.repair.request == 1)
        await send(site, source, audit=[(0, 0)], repaired=1)  # says so, and carries nothing
        watermark = await site.until(source, lambda found: found.repair.request == 2)
        assert watermark.repair.runs == (RepairRun(0, 0, CHUNK_BLOCKS),)


async def test_repair_counts_only_when_its_blocks_have_come(site: Site) -> None:
    """Without a sample of the place: the number alone says that it is repaired."""
    source = a_source()
    async with site.applier(source):
        await send(site, source)
        bypass(source, 0, 0)
        await send(site, source, audit=[(0, 0)])
        await site.until(source, lambda found: found.repair.request == 1)
        source.touch(0, range(CHUNK_BLOCKS - 1))
        await send(site, source, audit=[], repaired=1)
        watermark = await site.until(source, lambda found: found.repair.request == 2)
        assert watermark.repair.runs == (RepairRun(0, 0, CHUNK_BLOCKS),)
        # In two parts, of which the last one says so.
        source.touch(0, range(8))
        await send(site, source, audit=[], repaired=1, consistency=Consistency.NONE)
        source.touch(0, range(8, CHUNK_BLOCKS))
        repaired = await send(site, source, audit=[(0, 0)], repaired=2)
        await site.until(source, lambda found: not found.repair.runs)
    site.check(source, repaired)


async def test_repair_that_came_to_no_avail_does_not_count_for_the_next_request(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    take = Arrivals.take

    def noted(
        self: Arrivals,
        disk: int,
        extents: Sequence[tuple[int, int]],
        runs: Collection[RepairRun] | None = None,
    ) -> None:
        threads.add(threading.current_thread())
        take(self, disk, extents, runs)

    monkeypatch.setattr(Arrivals, "take", noted)
    source = a_source()
    async with site.applier(source):
        await send(site, source)
        bypass(source, 0, 0)
        await send(site, source, audit=[(0, 0)])
        await site.until(source, lambda found: found.repair.request == 1)
        source.touch(0, range(CHUNK_BLOCKS))
        with monkeypatch.context() as patch:  # all of it comes, and still is something else
            patch.setattr(
                source, "audit_digest", lambda disk, chunk: AuditDigest(disk, chunk, b"x" * 16)
            )
            await send(site, source, audit=[(0, 0)], repaired=1)
        await site.until(source, lambda found: found.repair.request == 2)
        await send(site, source, audit=[], repaired=2)  # and nothing comes
        watermark = await site.until(source, lambda found: found.repair.request == 3)
        assert watermark.repair.runs == (RepairRun(0, 0, CHUNK_BLOCKS),)
    assert threads == {threading.main_thread()}  # one at a time


async def test_repair_heals_older_points_too(site: Site) -> None:
    source = a_source()
    async with site.applier(source, **QUICK_SCRUB):
        await send(site, source)
        source.write(0, 0, source.random.randbytes(BLOCK_BYTES))
        second = await send(site, source)
        reader = ReaderStore(str(site.store), source.machine)
        rot(reader, second.stamp, source, 0)
        watermark = await site.until(source, lambda found: bool(found.repair.runs))
        assert watermark.repair.runs == (RepairRun(0, 0, 1),)
        source.touch(0, [0])
        await send(site, source, repaired=watermark.repair.request)
        await site.until(source, lambda found: not found.repair.runs)
        await until(lambda: not reader.damages())
    site.check(source, second)


def rot(reader: ReaderStore, stamp: Stamp, source: Source, block: int) -> None:
    """Change the block's bytes in the layer of a changeset."""
    wanted = bytes(source.disks[0][block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
    chain = reader.chain()
    position = next(one.position for one in chain.points if one.bookmark.stamp == stamp)
    row = next(row for row in chain.layers if row.last == position)
    path = os.path.join(reader.folder, row.file)
    with open(path, "r+b") as file:
        at = file.read().index(wanted)
        file.seek(at + 5)
        file.write(bytes([wanted[5] ^ 1]))


@pytest.mark.parametrize("place", ["layer", "base"])
async def test_rotten_byte_is_found_by_the_scrub_and_repaired(site: Site, place: str) -> None:
    source = a_source()
    retention = {"retention_days": 0 if place == "base" else 1}
    async with site.applier(source, retention=retention):
        await send(site, source)
        source.write(1, 2, b"y" * BLOCK_BYTES)
        await send(site, source)
        if place == "base":
            reader = ReaderStore(str(site.store), source.machine)
            await until(lambda: reader.chain().base_position == 2)
    flip(site, source, disk=0, block=5)
    async with site.applier(source, retention=retention, **QUICK_SCRUB):
        watermark = await site.until(source, lambda found: bool(found.repair.runs))
        assert watermark.repair.runs == (RepairRun(0, 5, 1),)
        assert '"code":"rotten"' in site.events(source)
        source.touch(0, [5])
        repaired = await send(site, source, repaired=watermark.repair.request)
        await site.until(source, lambda found: not found.repair.runs)
    site.check(source, repaired)


async def test_no_scrub_before_there_is_a_point(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "IDLE_SECONDS", 0.05)
    source = a_source()
    async with site.applier(source, **QUICK_SCRUB) as service:

        def scrubbed_bytes() -> float:
            labels = {"machine": "web"}
            name = "understudy_applier_scrubbed_bytes_total"
            return service.registry.get_sample_value(name, labels) or 0.0

        await send(site, source, consistency=Consistency.NONE)
        await asyncio.sleep(20 * keeping.IDLE_SECONDS)
        assert scrubbed_bytes() == 0
        source.write(1, 2, b"y" * BLOCK_BYTES)
        await send(site, source)
        await until(lambda: scrubbed_bytes() > 0)


async def test_rotten_byte_is_found_by_the_audit(site: Site) -> None:
    source = a_source()
    async with site.applier(source):
        await send(site, source)
        flip(site, source, disk=0, block=20)
        source.write(1, 2, b"y" * BLOCK_BYTES)
        await send(site, source, audit=[(0, 1)])
        watermark = await site.until(source, lambda found: bool(found.repair.runs))
        assert watermark.repair.runs == (RepairRun(0, CHUNK_BLOCKS, CHUNK_BLOCKS),)
        assert '"code":"rotten"' in site.events(source)


def flip(site: Site, source: Source, *, disk: int, block: int) -> None:
    """Change one byte where the newest point has the block's data."""
    reader = ReaderStore(str(site.store), source.machine)
    data = bytes(source.disks[disk][block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
    for folder, _, files in os.walk(reader.folder):
        for file in files:
            path = os.path.join(folder, file)
            with open(path, "rb") as image:
                at = image.read().find(data)
            if at < 0 or not file.endswith((".layer", ".img")):
                continue
            with open(path, "r+b") as image:
                image.seek(at + 100)
                image.write(bytes([data[100] ^ 0x10]))
            return
    raise AssertionError("the block is nowhere")


async def test_points_of_the_lost_past_stay_when_a_repair_is_asked_for(site: Site) -> None:
    source = a_source()
    async with site.applier(source):
        first = await send(site, source)
        bypass(source, 0, 0)
        await send(site, source, audit=[(0, 0)])
        await site.until(source, lambda found: found.repair.request == 1)
    assert site.stamps(source) == [Stamp(1, 1), Stamp(1, 2)]
    site.check(source, first)
