"""What a start makes of what a crash left in the spool's folder."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from appliance.process_server.disk_threads import DiskThreads
from appliance.process_server.order import Position
from appliance.process_server.room import Room
from appliance.process_server.segment_file import AttemptId, Segment
from appliance.process_server.spool import Ledger, Spool
from appliance.process_server.stream import Stream
from replication.bookmark import NOTHING, Stamp
from replication.errors import ConfigError, IntegrityError, PeerError
from tests.appliance.process_server.sample import SampleChangeset, make_changeset

MACHINE = uuid.UUID("6f1c1a0e-93a4-4c0e-9f57-0d4b8a1c2e3f")


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(str(tmp_path / "spool"))
    try:
        yield spool
    finally:
        spool.close()


def store(spool: Spool, changeset: SampleChangeset, *, committed: bool = True) -> AttemptId:
    attempt = AttemptId(changeset.machine, changeset.stamp, changeset.attempt)
    spool.make_attempt(attempt)
    for index, content in enumerate(changeset.segments):
        file = spool.receive(attempt)
        file.write([content])
        spool.place(attempt, file, file.finish(index))
        file.discard()
    if committed:
        spool.write_manifest(attempt, changeset.content)
    return attempt


async def restore(spool: Spool, room: Room) -> Stream:
    with DiskThreads() as disk:
        (stored,) = spool.load()
        stream = Stream(MACHINE, spool, room, disk)
        await stream.restore(stored)
        return stream


def files(spool: Spool) -> list[str]:
    folder = Path(spool.folder)
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    )


names = st.builds(
    Segment,
    st.integers(0, 8191),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 1 << 32),
    st.integers(1, 9999),
    st.integers(0, 1 << 25),
)


@given(names)
def test_file_name_tells_the_segment(segment: Segment) -> None:
    assert Segment.from_file_name(segment.file_name, segment.size_bytes) == segment


@given(st.text())
def test_foreign_file_name_tells_nothing(name: str) -> None:
    found = Segment.from_file_name(name, 1)
    assert found is None or found.file_name == name


async def test_start_finds_what_was_committed_and_what_was_not(spool: Spool) -> None:
    first, second = (make_changeset(MACHINE, Stamp(1, number)) for number in (1, 2))
    store(spool, first)
    open_attempt = store(spool, second, committed=False)
    room = Room(1 << 30)
    stream = await restore(spool, room)
    assert stream.position.committed == first.stamp
    assert stream.position.digest == xxhash.xxh3_128_digest(first.content)
    assert list(stream.held) == [first.stamp]
    assert list(stream.attempts) == [(open_attempt.stamp, open_attempt.attempt)]
    assert not stream.known
    total = sum(map(len, (*first.segments, *second.segments, first.content)))
    assert room.taken_bytes == total + 5 * 4096


async def test_start_drops_what_the_ledger_says_is_applied(spool: Spool) -> None:
    applied = make_changeset(MACHINE, Stamp(1, 1))
    half = make_changeset(MACHINE, Stamp(1, 2))
    store(spool, applied)
    store(spool, half, committed=False)
    spool.write_ledger(MACHINE, Ledger(Position(Stamp(1, 2), applied=Stamp(1, 2)), 77))
    room = Room(1 << 30)
    stream = await restore(spool, room)
    assert stream.known
    assert (stream.position.committed, stream.durable_ns) == (Stamp(1, 2), 77)
    assert room.taken_bytes == 0
    assert files(spool) == [f"{MACHINE}/ledger.json"]


async def test_start_drops_the_half_of_a_prune(spool: Spool) -> None:
    attempt = store(spool, make_changeset(MACHINE, Stamp(1, 3)))
    folder = Path(spool.folder) / str(MACHINE) / "00000001" / "000000000003"
    (folder / attempt.attempt.hex() / "manifest").unlink()
    spool.write_ledger(MACHINE, Ledger(Position(Stamp(1, 3), applied=Stamp(1, 3))))
    await restore(spool, Room(1 << 30))
    assert files(spool) == [f"{MACHINE}/ledger.json"]


async def test_start_forgets_what_was_on_its_way(spool: Spool, tmp_path: Path) -> None:
    changeset = make_changeset(MACHINE, Stamp(1, 1))
    attempt = store(spool, changeset, committed=False)
    spool.receive(attempt).write([changeset.segments[0][:100]])
    folder = Path(spool.folder) / str(MACHINE)
    (folder / "00000001" / "000000000001" / attempt.attempt.hex() / "manifest.ab.new").touch()
    (folder / "ledger.json.ab.new").touch()
    spool.close()
    again = Spool(spool.folder)
    try:
        stream = await restore(again, Room(1 << 30))
        assert stream.position.committed == NOTHING
        assert len(files(again)) == 2
    finally:
        again.close()


@pytest.mark.parametrize("damage", ["manifest", "segment", "ledger"])
def test_damage_is_named(spool: Spool, damage: str) -> None:
    store(spool, make_changeset(MACHINE, Stamp(1, 1)))
    spool.write_ledger(MACHINE, Ledger(Position()))
    victim = {"manifest": "*/*/*/manifest", "segment": "*/*/*/000001.*", "ledger": "ledger.json"}
    (path,) = (Path(spool.folder) / str(MACHINE)).glob(victim[damage])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(IntegrityError, match=f"{MACHINE}.* is damaged"):
        spool.load()


def test_segment_is_read_only_as_it_was_written(spool: Spool) -> None:
    changeset = make_changeset(MACHINE, Stamp(1, 1))
    attempt = store(spool, changeset)
    (stored,) = spool.load()[0].attempts
    assert spool.read_segment(attempt, stored.segments[1]) == changeset.segments[1]
    (path,) = (Path(spool.folder) / str(MACHINE)).glob("*/*/*/000001.*")
    path.write_bytes(bytes(len(changeset.segments[1])))
    with pytest.raises(IntegrityError, match="its digest does not match"):
        spool.read_segment(attempt, stored.segments[1])


def test_frames_that_skip_are_refused(spool: Spool) -> None:
    changeset = make_changeset(MACHINE, Stamp(1, 1), segment_count=3, frames_per_segment=1)
    file = spool.receive(AttemptId(MACHINE, changeset.stamp, changeset.attempt))
    try:
        with pytest.raises(PeerError, match="frame 2 comes where 1 was expected"):
            file.write([changeset.segments[0], changeset.segments[2]])
    finally:
        file.discard()
    assert files(spool) == []


def test_second_owner_is_refused(spool: Spool) -> None:
    with pytest.raises(ConfigError, match="in use by another process"):
        Spool(spool.folder)
