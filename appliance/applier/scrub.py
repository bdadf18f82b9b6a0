"""Re-reads the newest point against its digests, a little at a time, round and round.

Every slice opens a view of its own: one that was kept would hold the base back for as long as a
round takes.
"""

import random

import numpy as np
import numpy.typing as npt

from appliance.applier.audit import Finding, find_rotten
from appliance.applier.store.machine_store import MachineStore
from replication.block_set import BLOCK_BYTES

SLICE_BYTES_MAX = 64 << 20
LOOK_BLOCKS = 1 << 14
"""Blocks whose digests are looked at at once for holes, which need no reading."""

LOOKS_MAX = 1024
"""In one slice: 64 GiB of holes."""


class Scrub:
    """One machine's scrub. It starts anywhere: restarts must not spare the end of the disks."""

    def __init__(self) -> None:
        self._start = random.random()  # noqa: S311 - only to start anywhere
        self._at: tuple[int, int] | None = None

    def run(self, store: MachineStore, bytes_max: int) -> tuple[int, list[Finding]]:
        """Read about ``bytes_max`` of the newest position; return bytes read and what is rotten."""
        head = store.head
        if head is None:
            return 0, []
        disks = sorted(disk.index for disk in store.chain().points[-1].disks)
        disk, block = self._at or (disks[int(self._start * len(disks))], -1)
        if disk not in disks:
            disk, block = disks[0], 0
        done_bytes, looks = 0, 0
        findings: list[Finding] = []
        with store.open_view(head.position, disk) as view:
            if block < 0:
                block = int(self._start * view.block_count)
            while block < view.block_count and done_bytes < bytes_max and looks < LOOKS_MAX:
                room = -(-(bytes_max - done_bytes) // BLOCK_BYTES)
                count = min(LOOK_BLOCKS, view.block_count - block, room)
                for first, length in _data_runs(view.has_data(block, count)):
                    findings += find_rotten(view, block + first, length)
                    done_bytes += length * BLOCK_BYTES
                block += count
                looks += 1
            at_end = block >= view.block_count
        if at_end:
            disk, block = disks[(disks.index(disk) + 1) % len(disks)], 0
        self._at = (disk, block)
        return done_bytes, findings


def _data_runs(has_data: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Runs (first, count) of blocks that are not holes."""
    edges = np.flatnonzero(np.diff(has_data.astype(np.int8), prepend=0, append=0))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
