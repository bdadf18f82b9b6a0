"""The comparison names every chunk that differs, whatever happens on the way, and few others."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from agents.mobility.bookkeeping import begin_resync, finish, make_pending, require_resync
from agents.mobility.compare import STEP_MIBS, Comparison
from agents.mobility.stream_state import Pending, StreamStateFile
from replication.block_set import BLOCK_BYTES
from replication.bookmark import NOTHING, Stamp
from replication.checksum import CHUNK_BYTES, block_digests, chunk_digest
from replication.control.report import ResyncCause
from replication.errors import CaptureError
from replication.stream import StreamState
from replication.sums import PART_SUMS, SumsPlace, mib_sums, seal_sums
from replication.watermark import NO_ATTEMPT, Watermark
from tests.agents.mobility.capture_rig import DURING_READS, MIB, Machine

if TYPE_CHECKING:
    import contextlib
    import uuid
    from pathlib import Path

    from tests.agents.mobility.conftest import LoopDisk, MakeLoopDisk

KEY = bytes(range(32))
BASIS = b"b" * 16


@pytest.fixture
def source(machine: uuid.UUID, tmp_path: Path, opened: contextlib.ExitStack) -> Machine:
    return Machine(machine, tmp_path, opened)


class Site:
    """The second site as the comparison sees it: images, and what it is asked for."""

    def __init__(self, machine: uuid.UUID, images: list[bytearray]) -> None:
        self.machine, self.images = machine, images
        self.asked: list[tuple[int, int, int]] = []
        self.missing: set[tuple[int, int, int]] = set()
        self.spoiled: set[tuple[int, int, int]] = set()

    async def fetch(self, place: SumsPlace) -> bytes | None:
        which = (place.disk, place.level, place.part)
        self.asked.append(which)
        if which in self.missing:
            return None
        image = self.images[place.disk]
        assert place.size_bytes == len(image)
        chunks = b"".join(
            chunk_digest(
                block_digests(
                    image[at : at + CHUNK_BYTES].ljust(
                        min(CHUNK_BYTES, -(-(len(image) - at) // BLOCK_BYTES) * BLOCK_BYTES), b"\0"
                    )
                )
            )
            for at in range(0, len(image), CHUNK_BYTES)
        )
        sums = chunks if place.level == 2 else mib_sums(chunks)
        begin = place.part * PART_SUMS * 16
        sealed = bytearray(seal_sums(KEY, place, sums[begin : begin + PART_SUMS * 16]))
        if which in self.spoiled:
            sealed[-3] ^= 1
        return bytes(sealed)


def begun(source: Machine, *disks: LoopDisk) -> Site:
    """A resync that has been closed off, with a second site that equals the disks."""
    source.protect(*disks)
    require_resync(source.state, ResyncCause.TRACKING_LOST, "tracking was lost")
    counts = {disk.index: disk.block_count for disk in source.disks}
    identities = {disk.index: disk.device.identity for disk in source.disks}
    blank = StreamState(NOTHING, NO_ATTEMPT, 0, 0, Watermark(source.id))
    for disk in source.disks:  # as the resynchroniser does before it closes the generation
        disk.tracker.swap()
        disk.tracker.forget()
    for blocks in source.state.todo.values():
        blocks.clear()
    begin_resync(source.state, blank, counts, identities)
    stamp = Stamp(source.state.position.generation, 1)
    make_pending(source.state, Pending(stamp, b"a" * 16, whole=False), {}, audit_chunk=0)
    finish(source.state)
    return Site(source.id, [bytearray(disk.image.read_bytes()) for disk in disks])


def compare(source: Machine, site: Site, basis: bytes = BASIS) -> Comparison:
    made = Comparison(
        source.disks,
        source.state,
        site.fetch,
        machine=source.id,
        data_key=KEY,
        share_max=1.0,
        stopping=asyncio.Event(),
    )
    stamp = Stamp(source.state.position.generation, source.state.position.committed)
    asyncio.run(made.run(stamp, basis))
    return made


def todo(source: Machine, disk: int = 0) -> set[int]:
    """The chunks that are to be sent."""
    runs = source.state.todo[disk].runs()
    return {block // 16 for first, count in runs for block in range(first, first + count)}


def test_chunks_that_differ_are_found_and_no_others(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    chance = random.Random(3)
    disks = [loop_disk(40 * MIB), loop_disk(3 * MIB + 5 * BLOCK_BYTES + 512)]
    disks[0].write(range(0, 2000, 3), b"d")
    disks[1].write(range(0, 700, 7), b"e")
    site = begun(source, *disks)
    wanted: dict[int, set[int]] = {0: {0, 639}, 1: {48}}  # the first, the last, the short last one
    for disk, image in enumerate(site.images):
        wanted[disk] |= {chance.randrange(len(image) // CHUNK_BYTES) for _ in range(12)}
        for chunk in wanted[disk]:
            at = min(chunk * CHUNK_BYTES + chance.randrange(CHUNK_BYTES), len(image) - 1)
            image[at] ^= 1
    made = compare(source, site)
    assert [todo(source, disk) for disk in (0, 1)] == [wanted[0], wanted[1]]
    assert made.progress.done_bytes == made.progress.total_bytes == 44 * MIB


def test_small_sums_are_asked_for_where_large_ones_differ(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(300 * MIB)  # two parts of level 2
    disk.write([1, 70000], b"d")
    site = begun(source, disk)
    compare(source, site)
    assert site.asked == [(0, 1, 0)]
    site.images[0][280 * MIB] ^= 1
    source.state.save(basis=bytes(16))
    compare(source, site)
    assert site.asked[1:] == [(0, 1, 0), (0, 2, 1)]
    assert todo(source) == {280 * 16}


def test_holes_cost_nothing_and_count_as_zeros(source: Machine, loop_disk: MakeLoopDisk) -> None:
    disk = loop_disk(20 * MIB + 512)
    site = begun(source, disk)
    read: list[int] = []
    DURING_READS.append(lambda: read.append(1))
    site.images[0][19 * MIB + 3] = 1  # data there, a hole here
    compare(source, site)
    DURING_READS.clear()
    assert read == []
    assert todo(source) == {19 * 16}


@pytest.mark.parametrize("wrong", ["missing", "spoiled"])
@pytest.mark.parametrize("level", [1, 2])
def test_sums_that_cannot_be_used_stop_it_and_it_goes_on_from_there(
    source: Machine, loop_disk: MakeLoopDisk, wrong: str, level: int
) -> None:
    disks = [loop_disk(2 * STEP_MIBS * MIB), loop_disk(MIB)]
    for disk in disks:
        disk.write([5], b"d")
    site = begun(source, *disks)
    for image in site.images:
        image[77] ^= 1
    getattr(site, wrong).add((1, level, 0))
    with pytest.raises(CaptureError, match="second site"):
        compare(source, site)
    resync = source.state.position.resync
    assert resync is not None
    assert resync.cursor == 2 * STEP_MIBS * MIB
    assert todo(source, 0) == {0}
    assert todo(source, 1) == set()
    site.missing.clear()
    site.spoiled.clear()
    site.asked.clear()
    source.state = StreamStateFile(str(source.folder / "state"), source.id)
    compare(source, site)
    assert {disk for disk, _, _ in site.asked} == {1}
    assert (todo(source, 0), todo(source, 1)) == ({0}, {0})


def test_another_basis_is_compared_from_the_beginning(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(2 * MIB)
    disk.write([0], b"d")
    site = begun(source, disk)
    compare(source, site)
    assert todo(source) == set()
    site.images[0][9] ^= 1
    compare(source, site)
    assert todo(source) == set()  # all of that basis is done
    compare(source, site, b"c" * 16)
    assert todo(source) == {0}
    assert source.state.position.basis == b"c" * 16


def test_what_is_written_while_it_is_read_is_marked(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(4 * MIB)
    disk.write(range(1024), b"d")
    site = begun(source, disk)
    DURING_READS.append(lambda: disk.write([0, 3, 1023], b"n"))
    compare(source, site)
    marked = source.disks[0].tracker.peek()
    now = disk.image.read_bytes()
    for block in (0, 3, 1023):
        assert now[block * BLOCK_BYTES] == ord("n")
        assert block in marked


def test_a_hole_that_is_written_after_it_was_looked_at_is_marked(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(4 * MIB)
    disk.write([0], b"d")
    site = begun(source, disk)
    DURING_READS.append(lambda: disk.write([1000], b"n"))
    compare(source, site)
    assert 1000 in source.disks[0].tracker.peek()


def test_what_was_known_to_have_changed_stays_to_do(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    """A write that was under way reaches the disk after the comparison has read its block."""
    disk = loop_disk(MIB)
    source.protect(disk)
    source.seed()
    source.state.todo[0].add_run(33, 1)
    require_resync(source.state, ResyncCause.OPERATOR, "ordered")
    blank = StreamState(NOTHING, NO_ATTEMPT, 0, 0, Watermark(source.id))
    identities = {0: source.disks[0].device.identity}
    begin_resync(source.state, blank, {0: 256}, identities)
    assert list(source.state.todo[0].runs()) == [(33, 1)]
