"""The applier's part of a resync: the old generation ends, its state's sums are told, and only what
was compared with exactly that state is applied to it.
"""

import asyncio
import contextlib
import json
import shutil
from pathlib import Path

import pytest

from appliance.applier import repair_book
from appliance.applier.repair_book import RepairBook
from appliance.applier.resync_record import ResyncRecord
from appliance.applier.store import ReaderStore
from replication.block_set import BLOCK_BYTES
from replication.bookmark import NOTHING, Consistency, Stamp
from replication.cache_layout import sums_container, sums_name
from replication.checksum import CHUNK_BLOCKS, CHUNK_BYTES, block_digests, chunk_digest
from replication.errors import StorageError
from replication.manifest import NO_BASIS, Manifest
from replication.sums import (
    SUMS_BYTES_MAX,
    SumsPlace,
    mib_sums,
    open_sums,
    part_count,
    seal_sums,
)
from replication.watermark import RepairRun, Watermark, WatermarkKey
from tests.appliance.applier.running import Site, until
from tests.appliance.applier.source import Source, a_source


def digests_of(image: bytes) -> bytes:
    """The chunk digests of a disk."""
    made = []
    for at in range(0, len(image), CHUNK_BYTES):
        chunk = image[at : at + CHUNK_BYTES]
        made.append(chunk_digest(block_digests(chunk.ljust(-(-len(chunk) // 4096) * 4096, b"\0"))))
    return b"".join(made)


def place_of(source: Source, basis: bytes, disk: int, level: int, part: int = 0) -> SumsPlace:
    size_bytes = len(source.disks[disk])
    stamp = Stamp(source.generation, 1)
    return SumsPlace(source.machine, stamp, basis, disk, level, part, size_bytes)


async def read_sums(site: Site, source: Source, basis: bytes, disk: int, level: int) -> bytes:
    container = sums_container(source.machine, source.generation)
    found = b""
    for part in range(part_count(len(source.disks[disk]), level)):
        data = await site.account.read(container, sums_name(disk, level, part), SUMS_BYTES_MAX)
        assert data is not None
        found += open_sums(source.data_key, place_of(source, basis, disk, level, part), data)
    return found


async def begin(site: Site, source: Source) -> Watermark:
    """Begin a resync, and wait for its sums."""
    await source.resync().put(site.account)
    stamp = Stamp(source.generation, 1)
    return await site.until(source, lambda told: told.applied == stamp and told.sums != NO_BASIS)


async def test_sums_are_those_of_the_state_and_the_resync_ends_equal(any_site: Site) -> None:
    source = a_source()
    async with any_site.applier(source):
        await source.changeset().put(any_site.account)
        await any_site.until_applied(source, Stamp(1, 1))
        state = {disk: bytes(image) for disk, image in source.disks.items()}
        source.scribble()  # nobody tells of it
        watermark = await begin(any_site, source)
        assert watermark.is_authentic(WatermarkKey(source.data_key, source.machine))
        for disk, image in state.items():
            digests = digests_of(image)
            assert await read_sums(any_site, source, watermark.sums, disk, 2) == digests
            assert await read_sums(any_site, source, watermark.sums, disk, 1) == mib_sums(digests)
            touch_what_differs(source, disk, digests)
        source.basis = watermark.sums
        last = source.changeset()
        await last.put(any_site.account)
        watermark = await any_site.until_applied(source, last.stamp)
        assert (watermark.sums, watermark.lost) == (NO_BASIS, "")
        any_site.check(source, last)
        container = sums_container(source.machine, source.generation)
        for _ in range(200):
            if not await any_site.account.blobs(container, ""):
                break
            await asyncio.sleep(0.05)
        assert not await any_site.account.blobs(container, "")


async def test_disks_count_with_the_size_that_they_have_now(site: Site) -> None:
    source = a_source()
    async with site.applier(source):
        await source.changeset().put(site.account)
        await site.until_applied(source, Stamp(1, 1))
        state = {disk: bytes(image) for disk, image in source.disks.items()}
        grown, shrunk = sorted(source.disks)[:2]
        source.disks[grown] += source.random.randbytes(3 * CHUNK_BYTES + 512)
        del source.disks[shrunk][2 * CHUNK_BYTES + BLOCK_BYTES :]
        source.disks[9] = bytearray(source.random.randbytes(CHUNK_BYTES * 2))
        watermark = await begin(site, source)
        for disk, image in source.disks.items():
            known = state.get(disk, b"")[: len(image)].ljust(len(image), b"\0")
            assert await read_sums(site, source, watermark.sums, disk, 2) == digests_of(known)


async def test_parts_that_are_gone_altered_or_replayed_are_put_again(any_site: Site) -> None:
    source = a_source()
    async with any_site.applier(source):
        await source.changeset().put(any_site.account)
        await any_site.until_applied(source, Stamp(1, 1))
        watermark = await begin(any_site, source)
        container = sums_container(source.machine, source.generation)
        name = sums_name(0, 2, 0)
        good = await any_site.account.read(container, name, SUMS_BYTES_MAX)
        assert good is not None
        place = place_of(source, watermark.sums, 0, 2)
        sums = open_sums(source.data_key, place, good)
        flipped = bytearray(good)
        flipped[-5] ^= 1
        for bad in (bytes(flipped), good[:-1], seal_sums(bytes(32), place, sums)):
            await any_site.account.write(container, name, bad)
            await until_opens(any_site, source, container, name, place)
        with contextlib.suppress(StorageError):  # the applier puts some again while they go
            await any_site.account.drop(container)  # as a cache that was killed forgets
        await asyncio.sleep(0.5)
        await until_opens(any_site, source, container, name, place)
        assert (await any_site.watermark(source)).sums == watermark.sums


async def until_opens(
    site: Site, source: Source, container: str, name: str, place: SumsPlace
) -> None:
    for _ in range(600):
        data = await site.account.read(container, name, SUMS_BYTES_MAX)
        if data is not None:
            try:
                open_sums(source.data_key, place, data)
            except Exception:  # noqa: BLE001 - any way of being wrong
                data = None
        if data is not None:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{name} did not come back")


async def test_nothing_of_the_old_generation_is_applied_any_more(site: Site) -> None:
    source = a_source()
    async with site.applier(source):
        first = source.changeset()
        await first.put(site.account)
        await site.until_applied(source, Stamp(1, 1))
        late = []
        for _ in range(3):
            source.scribble()
            late.append(source.changeset())
        watermark = await begin(site, source)
        for changeset in late:
            with contextlib.suppress(StorageError):  # the applier drops the container meanwhile
                await changeset.put(site.account)
        await asyncio.sleep(0.6)
        again = await site.watermark(source)
        assert (again.applied, again.sums) == (Stamp(2, 1), watermark.sums)
        assert site.stamps(source) == [Stamp(1, 1), Stamp(2, 1)]
        site.check(source, first)


async def test_what_was_compared_with_another_state_is_refused(site: Site) -> None:
    source = a_source()
    async with site.applier(source):
        await source.changeset().put(site.account)
        await site.until_applied(source, Stamp(1, 1))
        await begin(site, source)
        source.scribble()
        for basis in (b"x" * 16, NO_BASIS):
            source.basis = basis
            source.number = 1
            changeset = source.changeset(consistency=Consistency.CRASH)
            await changeset.put(site.account)
            told = await site.until(source, lambda found: bool(found.lost))
            assert "another state" in told.lost
            assert (told.lost_generation, told.lost_cause) == (2, "stream-lost")
            assert told.applied == Stamp(2, 1)
            await site.account.drop(changeset.container)
            await site.until(source, lambda found: not found.lost)


async def test_another_stream_by_the_same_numbers_is_refused_unless_it_brings_all(
    site: Site,
) -> None:
    source = a_source()
    source.origin = b"a" * 16
    async with site.applier(source):
        for number in (1, 2):
            await source.changeset().put(site.account)
            await site.until_applied(source, Stamp(1, number))
    source.origin = b"b" * 16
    source.scribble()
    refused = source.changeset()
    await refused.put(site.account)
    async with site.applier(source):
        told = await site.until(source, lambda found: bool(found.lost))
        assert "another state" in told.lost
        assert (told.applied, told.lost_generation) == (Stamp(1, 2), 1)
        source.touch_all()
        whole = source.changeset(since=0)
        await whole.put(site.account)
        await site.until_applied(source, whole.stamp)
        source.scribble()
        last = source.changeset()
        await last.put(site.account)
        await site.until_applied(source, last.stamp)
        site.check(source, last)


def test_a_stream_counts_from_its_first_changeset_on_not_before(tmp_path: Path) -> None:
    """Its name is written before that is sealed, and the power may go in between."""
    source = Source({0: bytearray(4096)})

    def manifest(number: int, origin: bytes, since: int) -> Manifest:
        source.number, source.origin = number - 1, origin
        source.dirty = {at: set() for at in range(number)}
        return source.changeset(since=since).manifest

    ours, other = b"a" * 16, b"b" * 16
    record = ResyncRecord(str(tmp_path))
    first = manifest(1, ours, 0)
    assert record.fits(first, NOTHING)
    record.note_origin(first, NOTHING)
    begins = manifest(3, other, 0)
    assert record.fits(begins, Stamp(1, 2))
    record.note_origin(begins, Stamp(1, 2))
    record = ResyncRecord(str(tmp_path))
    assert not record.fits(manifest(4, other, 2), Stamp(1, 2))
    goes_on = manifest(4, ours, 2)
    assert record.fits(goes_on, Stamp(1, 2))
    record.note_origin(goes_on, Stamp(1, 2))
    record = ResyncRecord(str(tmp_path))
    assert record.fits(manifest(5, ours, 4), Stamp(1, 4))
    assert not record.fits(manifest(5, other, 4), Stamp(1, 4))
    assert not record.fits(manifest(5, NO_BASIS, 4), Stamp(1, 4))


async def test_a_store_put_back_takes_nothing_that_counts_from_what_it_lost(site: Site) -> None:
    source = a_source()
    folder = site.store / "machines" / str(source.machine)
    async with site.applier(source):
        await source.changeset().put(site.account)
        await site.until_applied(source, Stamp(1, 1))
    shutil.copytree(folder, site.folder / "backup")
    async with site.applier(source):
        source.scribble()
        await source.changeset().put(site.account)
        await site.until_applied(source, Stamp(1, 2))
        watermark = await begin(site, source)
    record = (folder / "resync.json").read_text()
    shutil.rmtree(folder)
    shutil.copytree(site.folder / "backup", folder)
    (folder / "resync.json").write_text(record)  # even where the record was not put back
    source.scribble()
    source.basis = watermark.sums
    await source.changeset().put(site.account)
    async with site.applier(source):
        told = await site.until(source, lambda now: bool(now.lost) and now.sums != NO_BASIS)
        assert told.applied == Stamp(2, 1)
        assert told.sums != watermark.sums


async def test_a_killed_applier_publishes_under_the_same_basis(site: Site) -> None:
    source = a_source()
    async with site.applier(source):
        await source.changeset().put(site.account)
        await site.until_applied(source, Stamp(1, 1))
    await source.resync().put(site.account)
    told = set()
    for delay in (0.0, 0.2, 0.4, 0.8, 1.2):
        process = site.spawn(source)
        await asyncio.sleep(1.0 + delay)
        process.kill()
        told.add((await site.watermark(source)).sums)
    async with site.applier(source):
        stamp = Stamp(2, 1)
        watermark = await site.until(
            source, lambda found: found.applied == stamp and found.sums != NO_BASIS
        )
        assert told <= {NO_BASIS, watermark.sums}
        for disk in source.disks:
            digests = digests_of(bytes(source.disks[disk]))
            assert await read_sums(site, source, watermark.sums, disk, 2) == digests


async def test_known_damage_matches_nothing_and_is_settled_by_the_resync(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair_book, "REPAIR_RUNS_MAX", 4)
    source = a_source()
    folder = site.store / "machines" / str(source.machine)
    async with site.applier(source):
        await source.changeset().put(site.account)
        await site.until_applied(source, Stamp(1, 1))
    book = RepairBook(str(folder))
    too_many = [RepairRun(0, 70 * at, 2) for at in range(6)]
    book.ask(too_many)
    assert book.lost
    async with site.applier(source) as service:
        told = await site.until(source, lambda found: bool(found.lost))
        assert told.lost_cause == "integrity"
        watermark = await begin(site, source)
        assert watermark.lost == ""
        digests = digests_of(bytes(source.disks[0]))
        found = await read_sums(site, source, watermark.sums, 0, 2)
        wrong = {run.block // CHUNK_BLOCKS for run in too_many}
        for chunk in range(len(digests) // 16):
            same = found[chunk * 16 : chunk * 16 + 16] == digests[chunk * 16 : chunk * 16 + 16]
            assert same == (chunk not in wrong)
        assert await read_sums(site, source, watermark.sums, 0, 1) != mib_sums(digests)
        touch_what_differs(source, 0, found)
        source.basis = watermark.sums
        last = source.changeset()
        await last.put(site.account)
        await site.until_applied(source, last.stamp)
        await until(lambda: not RepairBook(str(folder)).open_runs)
        await until(lambda: service.health.state == "normal")
        site.check(source, last)
    begun = ResyncRecord(str(folder)).find(2)
    assert begun is not None
    assert begun.settled


async def test_a_resync_that_mends_too_much_damage_is_the_last_also_over_a_restart(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair_book, "REPAIR_RUNS_MAX", 4)
    source = a_source()
    retention = {"retention_days": 0}  # whatever can be folded is folded at once
    folder = site.store / "machines" / str(source.machine)
    async with site.applier(source, retention=retention):
        await source.changeset().put(site.account)
        await site.until_applied(source, Stamp(1, 1))
    RepairBook(str(folder)).ask([RepairRun(0, 70 * at, 2) for at in range(6)])
    async with site.applier(source, retention=retention) as service:
        await until(lambda: "6 runs of blocks need repair" in str(service.health.warnings))
        watermark = await begin(site, source)
        theirs = await read_sums(site, source, watermark.sums, 0, 2)
        source.basis = watermark.sums
        touch_what_differs(source, 0, theirs)
        half = {(disk, block) for disk, block in source._pending if block < 200}
        left, source._pending = source._pending - half, half
        part = source.changeset(consistency=Consistency.NONE)
        await part.put(site.account)
        await site.until_applied(source, part.stamp)
    async with site.applier(source, retention=retention) as service:
        source.scribble(1)
        source._pending |= left
        last = source.changeset()
        await last.put(site.account)
        told = await site.until_applied(source, last.stamp)
        await until(lambda: not RepairBook(str(folder)).open_runs)
        await until(lambda: service.health.state == "normal")
        told = await site.watermark(source)
        assert (told.lost, told.repair.runs) == ("", ())
        site.check(source, last)


async def test_damage_found_after_the_sums_were_made_stays_open(site: Site) -> None:
    source = a_source()
    folder = site.store / "machines" / str(source.machine)
    async with site.applier(source):
        await source.changeset().put(site.account)
        await site.until_applied(source, Stamp(1, 1))
        watermark = await begin(site, source)
    RepairBook(str(folder)).ask([RepairRun(0, 3, 1)])
    async with site.applier(source):
        source.basis = watermark.sums
        await source.changeset().put(site.account)
        told = await site.until_applied(source, Stamp(2, 2))
        assert told.repair.runs == (RepairRun(0, 3, 1),)


async def test_what_a_reader_found_is_looked_at_and_asked_for(site: Site) -> None:
    source = a_source()
    folder = site.store / "machines" / str(source.machine)
    async with site.applier(source, scrub_bytes_per_second=0):
        await source.changeset().put(site.account)
        await site.until_applied(source, Stamp(1, 1))
    reader = ReaderStore(str(site.store), source.machine)
    with reader.open_view(reader.points()[-1].position, 0) as view:
        file, offset = view._place(3)
    content = bytearray((folder / file).read_bytes())
    content[offset + 77] ^= 1
    (folder / file).write_bytes(content)
    reported = folder / "reported"
    reported.mkdir()
    blocks = [[0, at] for at in range(len(source.disks[0]) // BLOCK_BYTES)]
    (reported / "a.json").write_text(json.dumps({"blocks": [*blocks, [63, 1], [0, 1 << 40]]}))
    (reported / "b.json").write_text("{")
    async with site.applier(source, scrub_bytes_per_second=0):
        told = await site.until(source, lambda found: bool(found.repair.runs))
        assert told.repair.runs == (RepairRun(0, 3, 1),)
        await until(lambda: not list(Path(reported).iterdir()))


def touch_what_differs(source: Source, disk: int, theirs: bytes) -> None:
    """What the agent's comparison comes to."""
    ours = digests_of(bytes(source.disks[disk]))
    blocks = -(-len(source.disks[disk]) // BLOCK_BYTES)
    for chunk in range(len(ours) // 16):
        if ours[chunk * 16 : chunk * 16 + 16] != theirs[chunk * 16 : chunk * 16 + 16]:
            first = chunk * CHUNK_BLOCKS
            source.touch(disk, range(first, min(first + CHUNK_BLOCKS, blocks)))
