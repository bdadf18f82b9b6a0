"""Changesets that are let go of while they are on their way, and a disk that is full then."""

import asyncio
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import xxhash
from prometheus_client import CollectorRegistry

from appliance.process_server.cache_account import CacheAccount, open_cache_account
from appliance.process_server.config import CacheConfig
from appliance.process_server.disk_threads import DiskThreads
from appliance.process_server.measures import Measures
from appliance.process_server.order import Position
from appliance.process_server.persistence import Persistence
from appliance.process_server.room import Room
from appliance.process_server.segment_file import AttemptId
from appliance.process_server.spool import Ledger, Spool
from appliance.process_server.stream import Stream
from appliance.process_server.upload_budget import UploadBudget
from appliance.process_server.uploader import Uploader
from daemon.service import Health
from replication.bookmark import Stamp
from replication.cache_layout import container_name, manifest_name, segment_name
from replication.errors import IntegrityError, StorageError
from replication.watermark import Watermark
from tests.appliance.process_server.rig import become
from tests.appliance.process_server.sample import SampleChangeset, make_changeset
from tests.azure_emu.fixtures import EmulatorProcess

RESTORABLE_NS = 1_650_000_000_000_000_000


@dataclass
class Spooled:
    """A stream in a spool, with an uploader whose only place a test can take."""

    spool: Spool
    disk: DiskThreads
    cache: CacheAccount
    stream: Stream
    budget: UploadBudget
    uploader: Uploader
    measures: Measures

    async def place(self, changeset: SampleChangeset) -> None:
        attempt = AttemptId(changeset.machine, changeset.stamp, changeset.attempt)
        for index, content in enumerate(changeset.segments):
            file = self.spool.receive(attempt)
            file.write([content])
            segment = file.finish(index)
            reserved = self.stream.room.reserve(segment.size_bytes, 1 << 30)
            await self.stream.place(attempt, file, segment, reserved)
            file.discard()

    async def commit(self, changeset: SampleChangeset) -> None:
        await self.place(changeset)
        digest = xxhash.xxh3_128_digest(changeset.content)
        await self.stream.commit(changeset.manifest, changeset.content, digest)

    async def restored(self) -> Stream:
        """The stream as a start finds it."""
        stream = Stream(self.stream.machine, self.spool, Room(1 << 30), self.disk)
        for stored in await self.disk.run(self.spool.load):
            await stream.restore(stored)
        return stream


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
async def spooled(folder: Path, azurite: EmulatorProcess) -> AsyncIterator[Spooled]:
    version = CacheConfig.model_fields["api_version"].default
    opened = open_cache_account(azurite.connection_string, api_version=version, connections_max=8)
    with DiskThreads() as disk:
        async with opened as cache:
            spool = Spool(str(folder))
            stream = Stream(uuid.uuid4(), spool, Room(1 << 30), disk)
            budget = UploadBudget(1, 1 << 30)
            measures = Measures(CollectorRegistry())
            persistence = Persistence(Health(), measures)
            uploader = Uploader(
                cache,
                disk,
                budget,
                persistence,
                measures,
                recheck_seconds=1.0,
                ahead_bytes_min=1,
            )
            try:
                yield Spooled(spool, disk, cache, stream, budget, uploader, measures)
            finally:
                spool.close()


async def test_stamp_that_is_taken_anew_while_its_first_changeset_is_on_its_way(
    spooled: Spooled,
) -> None:
    stream = spooled.stream
    await stream.learn(Ledger(Position(committed=Stamp(1, 10), applied=Stamp(1, 9)), 1 << 61))
    first = make_changeset(stream.machine, Stamp(1, 11), since=10)
    second = make_changeset(stream.machine, Stamp(1, 11), since=9)
    await spooled.budget.take(1)
    await spooled.commit(first)
    uploading = asyncio.create_task(spooled.uploader.run(stream))
    try:
        await asyncio.sleep(0.3)  # it waits for the place
        stream.watermark = Watermark(
            stream.machine, Stamp(1, 9), b"w" * 16, restorable_ns=RESTORABLE_NS
        )
        await stream.fall_back()
        assert stream.durable_ns == RESTORABLE_NS
        assert (await spooled.restored()).durable_ns == RESTORABLE_NS
        await spooled.commit(second)
        spooled.budget.give_back(1)
        container = container_name(stream.machine, second.stamp)
        await become(lambda: uploading.done() or stream.held[second.stamp].whole)
        assert not uploading.done(), uploading.exception()
        found = await spooled.cache.manifest(container, manifest_name(11))
        assert found == second.content
        assert stream.durable_ns == second.manifest.bookmark.time_ns
    finally:
        uploading.cancel()
        await asyncio.wait([uploading])


async def test_what_was_let_go_of_before_it_was_in_the_cache_is_not_durable(
    spooled: Spooled,
) -> None:
    stream = spooled.stream
    await stream.learn(Ledger(Position()))
    changesets = [make_changeset(stream.machine, Stamp(1, number)) for number in (1, 2)]
    await spooled.budget.take(1)
    for changeset in changesets:
        await spooled.commit(changeset)
    uploading = asyncio.create_task(spooled.uploader.run(stream))
    try:
        await asyncio.sleep(0.3)
        await stream.end()
        spooled.budget.give_back(1)
        await spooled.commit(third := make_changeset(stream.machine, Stamp(1, 3)))
        await become(lambda: uploading.done() or stream.held[third.stamp].uploads.done)
        assert (
            await spooled.cache.manifest(
                container_name(stream.machine, Stamp(1, 1)), manifest_name(1)
            )
            is None
        )
    finally:
        uploading.cancel()
        await asyncio.wait([uploading])
    for changeset in changesets:
        assert stream.durable_ns != changeset.manifest.bookmark.time_ns


async def test_a_large_changeset_is_uploaded_ahead_and_seen_from_its_commit_on(
    spooled: Spooled,
) -> None:
    stream = spooled.stream
    await stream.learn(Ledger(Position()))
    large = make_changeset(stream.machine, Stamp(1, 1), segment_count=3)
    container = container_name(stream.machine, large.stamp)
    names = {segment_name(1, large.attempt, index) for index in range(3)}

    async def there() -> bool:
        return set(await spooled.cache.sizes(container)) == names

    uploading = asyncio.create_task(spooled.uploader.run(stream))
    try:
        await spooled.place(large)
        await become(there)
        assert not stream.durable_ns
        uploaded = spooled.measures.bytes_uploaded
        before = uploaded._value.get()
        await stream.commit(large.manifest, large.content, xxhash.xxh3_128_digest(large.content))
        await become(lambda: uploading.done() or stream.held[large.stamp].whole)
        assert uploaded._value.get() - before == len(large.content), "something was put twice"
        assert stream.durable_ns == large.manifest.bookmark.time_ns
    finally:
        uploading.cancel()
        await asyncio.wait([uploading])


async def test_an_attempt_that_is_dropped_on_its_way_and_comes_again_is_no_damage(
    spooled: Spooled,
) -> None:
    """Abandoned for want of room while a segment of it waits for its turn to be uploaded."""
    stream = spooled.stream
    await stream.learn(Ledger(Position()))
    large = make_changeset(stream.machine, Stamp(1, 1), segment_count=3)
    await spooled.budget.take(1)
    uploading = asyncio.create_task(spooled.uploader.run(stream))
    try:
        await spooled.place(large)
        (attempt,) = stream.attempts.values()
        await become(lambda: bool(attempt.uploads.begun))
        await stream.abandon([attempt])
        await spooled.commit(large)
        spooled.budget.give_back(1)
        await become(lambda: uploading.done() or stream.held[large.stamp].whole)
        assert not uploading.done(), uploading.exception()
    finally:
        uploading.cancel()
        await asyncio.wait([uploading])


async def test_fall_back_to_a_store_without_a_point_leaves_nothing_durable(
    spooled: Spooled,
) -> None:
    stream = spooled.stream
    await stream.learn(Ledger(Position(committed=Stamp(1, 10), applied=Stamp(1, 9)), 1 << 60))
    stream.watermark = Watermark(stream.machine, Stamp(1, 9), b"w" * 16)
    await stream.fall_back()
    assert (stream.durable_ns, (await spooled.restored()).durable_ns) == (0, 0)


class TestOnAFullDisk:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "small"
        folder.mkdir()
        tmpfs = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        subprocess.run(tmpfs, check=True)
        try:
            yield folder / "spool"
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)

    async def test_attempts_make_room_for_the_ledger(self, spooled: Spooled, folder: Path) -> None:
        stream = spooled.stream
        await stream.learn(Ledger(Position()))
        await spooled.commit(make_changeset(stream.machine, Stamp(1, 1)))
        await spooled.place(make_changeset(stream.machine, Stamp(1, 2)))
        fill(folder.parent / "ballast")
        await stream.end()
        assert not stream.held
        assert not stream.attempts
        assert (await spooled.restored()).position.committed == Stamp(1, 1)

    async def test_older_changesets_make_room_and_the_newest_tells_the_position(
        self, spooled: Spooled, folder: Path
    ) -> None:
        stream = spooled.stream
        await stream.learn(Ledger(Position()))
        for number in (1, 2):
            await spooled.commit(make_changeset(stream.machine, Stamp(1, number)))
        fill(folder.parent / "ballast")
        await stream.end()
        assert not stream.held
        assert (await spooled.restored()).position.committed == Stamp(1, 2)

    async def test_position_is_not_let_go_of_before_the_ledger_says_it(
        self, spooled: Spooled, folder: Path
    ) -> None:
        stream = spooled.stream
        await stream.learn(Ledger(Position()))
        await spooled.commit(make_changeset(stream.machine, Stamp(1, 1)))
        fill(folder.parent / "ballast")
        with pytest.raises(StorageError):
            await stream.end()
        assert (await spooled.restored()).position.committed == Stamp(1, 1)
        (folder.parent / "ballast").unlink()
        await stream.end()
        assert not stream.held
        assert (await spooled.restored()).position.committed == Stamp(1, 1)

    async def test_ledger_that_says_the_position_is_not_written_again(
        self, spooled: Spooled, folder: Path
    ) -> None:
        stream = spooled.stream
        await stream.learn(Ledger(Position()))
        for number in (1, 2):
            await spooled.commit(make_changeset(stream.machine, Stamp(1, number)))
        await stream.advance(Watermark(stream.machine, Stamp(1, 1), b"w" * 16))
        fill(folder.parent / "ballast")
        await stream.end()
        assert not stream.held
        assert (await spooled.restored()).position.committed == Stamp(1, 2)


def fill(ballast: Path) -> None:
    """Leave no room on the disk."""
    with ballast.open("ab", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


async def test_damage_takes_no_place_with_it_and_what_was_begun_is_begun_anew(
    spooled: Spooled, folder: Path
) -> None:
    """Else each damaged spool would take a place from all machines, until none is left."""
    stream = spooled.stream
    await stream.learn(Ledger(Position()))
    damaged = make_changeset(stream.machine, Stamp(1, 1), segment_count=4)
    await spooled.commit(damaged)
    coming = make_changeset(stream.machine, Stamp(1, 2), segment_count=2)
    await spooled.place(coming)
    attempts = stream.attempts.values()
    for one in attempts:
        one.uploads.begun = set(one.segments)  # an earlier run had begun them
    kept = _segments(folder, 1)
    assert len(kept) == 4
    for file in kept:
        file.unlink()
    with pytest.raises(ExceptionGroup) as raised:
        await spooled.uploader.run(stream)
    assert raised.group_contains(IntegrityError)
    async with asyncio.timeout(5):
        await spooled.budget.take(1)  # the only place
    spooled.budget.give_back(1)
    for file, content in kept.items():
        file.write_bytes(content)
    uploading = asyncio.create_task(spooled.uploader.run(stream))
    try:
        await become(lambda: uploading.done() or stream.held[damaged.stamp].whole)
        await become(
            lambda: uploading.done() or all(len(one.uploads.done) == 2 for one in attempts)
        )
        assert not uploading.done(), uploading.exception()
    finally:
        uploading.cancel()
        await asyncio.wait([uploading])


def _segments(folder: Path, number: int) -> dict[Path, bytes]:
    """The files of a changeset's segments in a spool."""
    return {
        file: file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and f"{number:012}" in str(file) and "manifest" not in file.name
    }
