"""Who holds a machine's certificate, or writes into the cache, must not harm the other machines."""

import contextlib
import gzip
import time
import uuid
import zlib
from pathlib import Path

import pytest
import xxhash
from azure.core.exceptions import ResourceExistsError
from azure.storage.blob import ContentSettings
from azure.storage.blob.aio import BlobServiceClient

from appliance.process_server.cache_account import open_cache_account
from appliance.process_server.cache_history import read_history
from appliance.process_server.changeset import Changeset
from appliance.process_server.config import CacheConfig
from appliance.process_server.disk_threads import DiskThreads
from appliance.process_server.order import Position, read_watermark
from appliance.process_server.room import Room
from appliance.process_server.segment_file import AttemptId, Segment
from appliance.process_server.spool import Spool
from appliance.process_server.stream import Stream
from appliance.process_server.watcher import names_of
from replication.bookmark import GENERATION_LEAP_MAX, NOTHING, Stamp
from replication.cache_layout import (
    CONTROL_CONTAINER,
    container_name,
    manifest_name,
    segment_name,
    watermark_name,
)
from replication.errors import PeerError
from replication.stream import ATTEMPT_HEADER, DIGEST_HEADER, segment_path
from replication.watermark import Watermark
from tests.appliance.process_server.rig import Agent, ProcessServer
from tests.appliance.process_server.sample import make_changeset
from tests.azure_emu.fixtures import EmulatorProcess

API_VERSION = CacheConfig.model_fields["api_version"].default


@pytest.mark.parametrize("encoding", ["deflate", "gzip"])
async def test_compressed_body_is_not_unpacked(server: ProcessServer, encoding: str) -> None:
    """Else a segment could be larger than the room that it has reserved."""
    machine = uuid.uuid4()
    changeset = make_changeset(
        machine, Stamp(1, 1), segment_count=1, frames_per_segment=1, blocks_per_frame=100
    )
    whole = changeset.segments[0]
    segment = whole[:88].ljust(len(whole), b"\0")  # a header, and a ciphertext that packs well
    packer = zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
    packed = packer.compress(segment) + packer.flush()
    headers = {
        ATTEMPT_HEADER: changeset.attempt.hex(),
        DIGEST_HEADER: xxhash.xxh3_128_hexdigest(segment),
    }
    path = segment_path(machine, changeset.stamp, 0)
    async with Agent(server, machine) as agent:
        reply = await agent.ask("PUT", path, packed, headers | {"Content-Encoding": encoding})
        assert reply.told == (400, "peer")
        assert server.spooled(machine) == []
        assert (await agent.ask("PUT", path, segment, headers)).status == 201


async def test_packed_watermark_is_read_as_it_lies_there(azurite: EmulatorProcess) -> None:
    machine = uuid.uuid4()
    packed = gzip.compress(bytes(8 << 20), 9)
    async with BlobServiceClient.from_connection_string(
        azurite.connection_string, api_version=API_VERSION
    ) as blobs:
        client = blobs.get_container_client(CONTROL_CONTAINER)
        with contextlib.suppress(ResourceExistsError):
            await client.create_container()
        settings = ContentSettings(content_encoding="gzip")
        await client.upload_blob(watermark_name(machine), packed, content_settings=settings)
    async with open_cache_account(
        azurite.connection_string, api_version=API_VERSION, connections_max=2
    ) as cache:
        found = await cache.watermark(machine)
    assert found is not None
    assert found.content == packed


def test_watermark_that_leaps_is_not_believed() -> None:
    machine = uuid.uuid4()
    known = Position(committed=Stamp(3, 9))
    near = Watermark(machine, Stamp(3 + GENERATION_LEAP_MAX, 1))
    assert read_watermark(near.to_bytes(), machine, known) == near
    far = Watermark(machine, Stamp((1 << 32) - 1, 1))
    with pytest.raises(PeerError, match="generation 3 is the newest"):
        read_watermark(far.to_bytes(), machine, known)


async def test_forged_manifest_of_the_last_generation_is_no_history(
    azurite: EmulatorProcess,
) -> None:
    """A new spool must not learn from it that no generation can follow."""
    machine = uuid.uuid4()
    forged = make_changeset(machine, Stamp((1 << 32) - 1, 1), segment_count=0)
    async with open_cache_account(
        azurite.connection_string, api_version=API_VERSION, connections_max=2
    ) as cache:
        container = container_name(machine, forged.stamp)
        await cache.put(container, manifest_name(1), forged.content)
        ledger, _ = await read_history(cache, machine)
        assert ledger.position.committed == NOTHING


def test_names_of_a_long_backlog_are_made_once() -> None:
    """A watermark may want 1024 of them, and each look at each of them would stop the daemon."""
    attempt = bytes(range(16))
    machine = uuid.uuid4()
    segments = tuple(Segment(index, bytes(16), index, 1, 100) for index in range(16))
    backlog = [
        Changeset(AttemptId(machine, Stamp(1, number), attempt), segments, 0, 1, 1, bytes(16))
        for number in range(1, 2001)
    ]
    began = time.process_time()
    names = names_of(backlog)
    assert time.process_time() - began < 2
    assert len(names) == 2000 * 17
    assert names[manifest_name(7)] == [(backlog[6], None)]
    assert names[segment_name(7, attempt, 3)] == [(backlog[6], segments[3])]


def test_wanted_manifest_of_what_is_applied_is_not_called_lost() -> None:
    """Junk under an old number in the cache must not send the stream back again and again."""

    def awaited(committed: Stamp, applied: Stamp) -> list[int]:
        position = Position(committed=committed, applied=applied)
        return [number for number in range(12) if position.awaits(number, applied)]

    assert awaited(Stamp(2, 9), Stamp(2, 7)) == [8, 9]
    assert awaited(Stamp(2, 2), Stamp(1, 7)) == [1, 2]
    assert awaited(Stamp(2, 9), Stamp(2, 9)) == []
    assert awaited(Stamp(2, 9), Stamp(3, 1)) == []


@pytest.mark.parametrize(
    ("stamp", "since", "leads_on"),
    [
        (Stamp(2, 8), 7, True),
        (Stamp(2, 9), 6, True),
        (Stamp(2, 9), 8, False),
        (Stamp(2, 7), 6, False),
        (Stamp(3, 1), 0, True),
        (Stamp(3, 2), 1, False),
    ],
)
def test_what_is_held_and_can_be_applied_is_not_given_up(
    stamp: Stamp, since: int, leads_on: bool, tmp_path: Path
) -> None:
    """Else a watermark that goes on asking would send the stream back again and again."""
    with DiskThreads() as disk, contextlib.closing(Spool(str(tmp_path))) as spool:
        stream = Stream(uuid.uuid4(), spool, Room(1 << 30), disk)
        attempt = AttemptId(stream.machine, stamp, bytes(16))
        stream.held[stamp] = Changeset(attempt, (), since, 1, 1, bytes(16))
        assert stream.leads_on(Stamp(2, 7)) is leads_on
