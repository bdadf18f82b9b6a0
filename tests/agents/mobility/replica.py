"""The second site in memory: a builder whose segments are read into images, as an applier does."""

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import xxhash

from agents.mobility.frame_builder import Segment, SegmentBuilder
from replication.bookmark import Stamp
from replication.envelope import AttemptKey, AttemptSealer
from replication.extent import Extent
from replication.frame import NEED_DATA, Frame, FrameReader, NeedData
from replication.manifest import SegmentEntry

KEY = bytes(range(32))
BLOCK = 4096


def opened_frames(key: AttemptKey, data: bytes) -> Iterator[tuple[Frame, bytes]]:
    """The frames of a segment, each with its plain data."""
    reader = FrameReader()
    reader.receive_data(data)
    while not isinstance(frame := reader.next_event(), NeedData):
        yield frame, key.open_frame(frame)
    assert frame is NEED_DATA
    reader.close()


@dataclass
class Received:
    """What came of one changeset, in the order of its frames; tried on images by ``apply``."""

    extents: list[tuple[int, Extent, bytes]] = field(default_factory=list)
    entries: list[SegmentEntry] = field(default_factory=list)
    frame_count: int = 0

    def apply(self, images: dict[int, bytearray]) -> None:
        for disk, extent, data in self.extents:
            start, size = extent.block * BLOCK, extent.count * BLOCK
            images[disk][start : start + size] = bytes(size) if extent.zero else data

    def blocks(self, disk: int) -> set[int]:
        return {
            block
            for found, extent, _ in self.extents
            if found == disk
            for block in range(extent.block, extent.end)
        }


class Replica:
    """Images of all disks, and the builders of the changesets that go to them."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.machine = uuid.uuid4()
        self.images = {disk: bytearray(-(-size // BLOCK) * BLOCK) for disk, size in sizes.items()}
        self.number = 0
        self._executor = ThreadPoolExecutor(2)

    def close(self) -> None:
        self._executor.shutdown()

    def builder(self, segment_bytes: int = 2 << 20) -> tuple[SegmentBuilder, Received]:
        self.number += 1
        sealer = AttemptSealer(KEY, self.machine, Stamp(1, self.number))
        key = AttemptKey(KEY, self.machine, sealer.stamp, sealer.attempt)
        received = Received()

        def submit(segment: Segment) -> None:
            assert segment.index == len(received.entries)
            assert xxhash.xxh3_128_digest(segment.data) == segment.entry.digest
            frames = 0
            for frame, data in opened_frames(key, segment.data):
                assert frame.header.number == received.frame_count
                received.frame_count += 1
                frames += 1
                offset = 0
                for extent in frame.header.extents:
                    piece = data[offset : offset + extent.data_bytes]
                    received.extents.append((frame.header.disk, extent, piece))
                    offset += extent.data_bytes
            assert (frames, len(segment.data)) == (
                segment.entry.frame_count,
                segment.entry.size_bytes,
            )
            received.entries.append(segment.entry)

        built = SegmentBuilder(sealer, self._executor, submit, segment_bytes=segment_bytes)
        return built, received
