"""The sums of a store's state, from the digests of its blocks: no data is read.

A block that is known to be damaged makes the sums above it match nothing, so that its source sends
it whatever its digest says.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from appliance.applier.store.machine_store import MachineStore
from appliance.applier.store.view import View
from replication.bookmark import DiskShape
from replication.checksum import CHUNK_BLOCKS, DIGEST_BYTES, chunk_digest
from replication.sums import MIB_CHUNKS, PART_SUMS, mib_sums, part_count, sum_count
from replication.watermark import RepairRun

GROUP_PARTS = MIB_CHUNKS
"""Parts of level 2 below one of level 1."""

_ZERO_CHUNK = chunk_digest(bytes(CHUNK_BLOCKS * DIGEST_BYTES))


@dataclass(frozen=True, slots=True)
class Group:
    """A part of level 1 with all parts of level 2 below it: 4 GiB of a disk."""

    shape: DiskShape
    number: int


@dataclass(frozen=True, slots=True)
class Sums:
    """One part's sums."""

    level: int
    part: int
    data: bytes


def groups_of(disks: Iterable[DiskShape]) -> list[Group]:
    """All groups of a state's disks, in order."""
    return [
        Group(shape, number) for shape in disks for number in range(part_count(shape.size_bytes, 1))
    ]


def sums_of(
    store: MachineStore, position: int, group: Group, damaged: Iterable[RepairRun]
) -> list[Sums]:
    """The parts of a group at ``position``, level 2 before level 1.

    Raises IntegrityError when the state cannot be read at all.
    """
    shape = group.shape
    wrong = _chunks_of(run for run in damaged if run.disk == shape.index)
    chunk_count = sum_count(shape.size_bytes, 2)
    first = group.number * GROUP_PARTS
    made = []
    level_1 = []
    with store.open_view(position, shape.index) as view:
        for part in range(first, min(first + GROUP_PARTS, part_count(shape.size_bytes, 2))):
            begin = part * PART_SUMS
            digests = _chunk_digests(view, begin, min(begin + PART_SUMS, chunk_count), wrong)
            made.append(Sums(2, part, digests))
            level_1.append(mib_sums(digests))
    return [*made, Sums(1, group.number, b"".join(level_1))]


def _chunk_digests(view: View, first: int, last: int, wrong: set[int]) -> bytes:
    begin, end = first * CHUNK_BLOCKS, min(last * CHUNK_BLOCKS, view.block_count)
    blocks = memoryview(view.block_digests(begin, end - begin))
    step = CHUNK_BLOCKS * DIGEST_BYTES
    whole = len(blocks) // step
    words = np.frombuffer(blocks[: whole * step], np.uint64).reshape(whole, -1)
    used = (words != 0).any(axis=1).tolist()
    made = []
    for index in range(last - first):
        if first + index in wrong:
            made.append(os.urandom(DIGEST_BYTES))
        elif index < whole and not used[index]:
            made.append(_ZERO_CHUNK)
        else:
            made.append(chunk_digest(blocks[index * step : (index + 1) * step]))
    return b"".join(made)


def _chunks_of(runs: Iterable[RepairRun]) -> set[int]:
    return {
        chunk
        for run in runs
        for chunk in range(run.block // CHUNK_BLOCKS, -(-(run.block + run.count) // CHUNK_BLOCKS))
    }
