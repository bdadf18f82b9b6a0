"""The applier from a local cache folder to sealed layers."""

import asyncio
import itertools
import os
import statistics
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import xxhash

from agents.mobility.config import SendConfig
from appliance.applier.apply import Wanted, open_segment
from appliance.applier.folder_account import FolderAccount
from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp
from replication.cache_layout import container_name, manifest_name, segment_name
from replication.checksum import block_digests
from replication.envelope import AttemptSealer
from replication.extent import Extent
from replication.frame import FrameHeader
from replication.manifest import Manifest, SegmentEntry
from tests.bench import plain
from tests.bench.figure import AtLeast, Row, spread
from tests.bench.place import MIB, Place
from tests.e2e.rig import Rig

CHANGESET_BYTES = 256 * MIB
FRAME_BLOCKS = 256
BLOCK_BYTES = 4096
OPENING_THREADS = 2
SECONDS_MAX = 300.0


@dataclass(frozen=True, slots=True)
class Made:
    """One changeset as it lies in the cache."""

    sealer: AttemptSealer
    segments: tuple[tuple[str, SegmentEntry, bytes], ...]
    manifest: Manifest


def measure(where: Place) -> list[Row]:
    """Applier: from a local cache folder of changesets to sealed layers."""
    count = 3 if where.quick else 9
    where.need_bytes(2 * count * CHANGESET_BYTES)
    rows = []
    for kind, data in (("incompressible", os.urandom), ("compressible", _half_random)):
        with where.rig() as rig:
            folder = rig.folder / "cache"
            folder.mkdir()
            rig.settings["applier"]["cache"] = {
                "connection_string_file": None,
                "folder": str(folder),
            }
            rig.configure()
            key = bytes.fromhex((rig.folder / "data.key").read_text())
            newest = None
            for number in range(1, count + 1):
                newest = _make(key, rig.machine, number, data)
                asyncio.run(_put(FolderAccount(str(folder)), newest))
            assert newest is not None
            os.sync()
            where.rest()
            rates = _rates(rig, count)
            opening, writing = _opening(newest), plain.write_and_sync(rig.folder, CHANGESET_BYTES)
        rows.append(
            Row(
                figure=f"applier: cache folder to sealed layer, {kind}",
                unit="MB/s",
                target=AtLeast(300),
                measured=statistics.median(rates),
                limit=min(opening, writing) / 1e6,
                limit_is=f"the slower of opening frames and digests alone on two threads "
                f"({opening / 1e6:.0f}) and one writer with fsync ({writing / 1e6:.0f})",
                note=spread(rates),
            )
        )
    return rows


def _half_random(size_bytes: int) -> bytes:
    half = bytes(range(64)) * 32
    return b"".join(os.urandom(2048) + half for _ in range(size_bytes // BLOCK_BYTES))


def _make(key: bytes, machine: uuid.UUID, number: int, data: Callable[[int], bytes]) -> Made:
    stamp = Stamp(1, number)
    sealer = AttemptSealer(key, machine, stamp)
    segments: list[tuple[str, SegmentEntry, bytes]] = []
    frames: list[bytes] = []
    for at in range(CHANGESET_BYTES // MIB):
        extent = Extent(at * FRAME_BLOCKS, FRAME_BLOCKS)
        frames.append(sealer.seal_frame(sealer.next_number(), 0, [extent], data(MIB)))
        last = at == CHANGESET_BYTES // MIB - 1
        if last or sum(map(len, frames)) >= SendConfig().segment_bytes:
            body = b"".join(frames)
            entry = SegmentEntry(len(frames), len(body), xxhash.xxh3_128_digest(body))
            name = segment_name(number, sealer.attempt, len(segments))
            segments.append((name, entry, body))
            frames = []
    now_ns = time.time_ns()
    manifest = Manifest(
        machine=machine,
        bookmark=Bookmark(stamp, now_ns, Consistency.CRASH),
        since=number - 1,
        attempt=sealer.attempt,
        disks=(DiskShape(0, "disk", CHANGESET_BYTES),),
        segments=tuple(entry for _, entry, _ in segments),
        changed_bytes=CHANGESET_BYTES,
        captured_ns=now_ns,
    )
    return Made(sealer, tuple(segments), manifest)


async def _put(account: FolderAccount, made: Made) -> None:
    container = container_name(made.manifest.machine, made.manifest.stamp)
    for name, _, body in made.segments:
        await account.write(container, name, body)
    sealed = made.manifest.seal(made.sealer)
    await account.write(container, manifest_name(made.manifest.stamp.number), sealed)
    await account.close()


def _rates(rig: Rig, count: int) -> list[float]:
    """Source MB a second of each changeset but the first, by the times at which layers were
    sealed.
    """
    rig.applier.start()
    rig.wait_until("all layers", lambda: len(rig.positions()) == count, SECONDS_MAX)
    sealed = [point.applied_ns / 1e9 for point in rig.positions()]
    return [
        CHANGESET_BYTES / (after - before) / 1e6 for before, after in itertools.pairwise(sealed)
    ]


def _opening(made: Made) -> float:
    """Bytes a second: digest of the segment, AES, zstd, digests of frame and blocks."""

    def take(_: FrameHeader, data: bytes) -> None:
        block_digests(data)

    stop = threading.Event()
    wanted, first = [], 0
    for name, entry, body in made.segments:
        wanted.append((Wanted(name, entry, first), body))
        first += entry.frame_count
    with ThreadPoolExecutor(OPENING_THREADS) as pool:
        began = time.monotonic()
        opened = [
            pool.submit(open_segment, body, one, made.sealer, take, stop) for one, body in wanted
        ]
        for future in opened:
            future.result()
        return CHANGESET_BYTES / (time.monotonic() - began)
