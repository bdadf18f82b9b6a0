"""The disks of the machine as a capture sees them: device, tracker, file systems."""

from collections.abc import Sequence
from dataclasses import dataclass

from agents.mobility.device import Device
from agents.mobility.mounts import MountedFileSystem, mounted_file_systems
from agents.mobility.stream_state import BlockSets
from agents.mobility.tracker import Tracker
from replication.block_set import BLOCK_BYTES, BlockSet, block_count_of
from replication.bookmark import DiskShape

_CHUNKED_READ_BLOCKS = 256


@dataclass(frozen=True, slots=True)
class SourceDisk:
    """One protected disk, open and tracked."""

    shape: DiskShape
    device: Device
    tracker: Tracker

    @property
    def index(self) -> int:
        return self.shape.index

    @property
    def block_count(self) -> int:
        return block_count_of(self.shape.size_bytes)

    def read_blocks(self, block: int, count: int) -> memoryview:
        """The blocks as they are now; the last one padded with zeros."""
        return memoryview(self.device.read(block * BLOCK_BYTES, count * BLOCK_BYTES))

    def allocated(self) -> BlockSet:
        """The blocks that may hold data; the others are holes of the image."""
        blocks = BlockSet(self.block_count)
        for first, count in self.device.allocated_runs():
            blocks.add_run(first, min(count, self.block_count - first))
        return blocks

    def file_systems(self) -> list[MountedFileSystem]:
        """What is mounted from the disk for writing."""
        return [fs for fs in mounted_file_systems(self.device) if not fs.read_only]


def peek_running(disks: Sequence[SourceDisk]) -> BlockSets:
    """What was written since the last swap, nothing cleared."""
    return {disk.index: disk.tracker.peek_running() for disk in disks}


def is_dirty(disks: Sequence[SourceDisk]) -> bool:
    return any(bool(disk.tracker.peek()) for disk in disks)
