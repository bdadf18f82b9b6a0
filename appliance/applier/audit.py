"""Does the store hold what the source had? Audit samples and repaired runs.

All of it reads through verified views, so that bytes which have rotted at rest are found as well
as blocks that were never what they should be. What is found becomes a run of blocks that the
source is asked to send again.

Source: FORMAT.md §3, §6 (audit), §8 (repair).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from appliance.applier.store.machine_store import MachineStore
from appliance.applier.store.model import Damage, RottenBlockError
from appliance.applier.store.view import View
from replication.block_set import BLOCK_BYTES
from replication.bookmark import DiskShape
from replication.checksum import CHUNK_BLOCKS, block_digests, chunk_digest
from replication.errors import IntegrityError
from replication.manifest import AuditDigest
from replication.watermark import RepairRun

READ_BLOCKS_MAX = 256
"""Blocks that are read at once."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Blocks that must be sent again.

    code: ``rotten`` (bytes at rest are not what their digest says) or ``differs`` (they are, and
          the source had others).
    damage: the place that has rotted, where it is one block's.
    """

    code: str
    run: RepairRun
    message: str
    damage: Damage | None = None


def audit_chunks(
    store: MachineStore,
    position: int,
    sample: Sequence[AuditDigest],
    disks: Sequence[DiskShape],
) -> list[Finding]:
    """Compare the store at ``position`` with the source's digests at that bookmark."""
    findings: list[Finding] = []
    for disk in sorted({item.disk for item in sample} & {disk.index for disk in disks}):
        with store.open_view(position, disk) as view:
            chunks = (item for item in sample if item.disk == disk)
            findings += [found for item in chunks if (found := _audit(view, item)) is not None]
    return findings


def _audit(view: View, item: AuditDigest) -> Finding | None:
    first = item.chunk * CHUNK_BLOCKS
    run = RepairRun(item.disk, first, min(CHUNK_BLOCKS, view.block_count - first))
    if run.count <= 0:
        return None
    where = f"chunk {item.chunk} of disk {item.disk} at {view.point.bookmark.stamp}"
    try:
        data = read_blocks(view, run.block, run.count)
    except IntegrityError as error:
        return Finding("rotten", run, f"{where}: {error}")
    found = chunk_digest(block_digests(data))
    if found == item.digest:
        return None
    return Finding("differs", run, f"{where} is {found.hex()} here, {item.digest.hex()} there")


def find_unreadable(store: MachineStore, position: int, runs: Iterable[RepairRun]) -> list[Finding]:
    """Which of ``runs`` cannot be read whole at ``position``."""
    findings: list[Finding] = []
    wanted = list(runs)
    for disk in sorted({run.disk for run in wanted}):
        with store.open_view(position, disk) as view:
            for run in (run for run in wanted if run.disk == disk):
                findings += find_rotten(view, run.block, run.count)
    return findings


def find_rotten(view: View, block: int, count: int) -> list[Finding]:
    """Read ``count`` blocks; name each that is not what its digest says."""
    findings: list[Finding] = []
    end = min(block + count, view.block_count)
    for first in range(block, end, READ_BLOCKS_MAX):
        part = min(READ_BLOCKS_MAX, end - first)
        try:
            read_blocks(view, first, part)
        except IntegrityError:
            for at in range(first, first + part):
                try:
                    read_blocks(view, at, 1)
                except IntegrityError as error:
                    damage = error.damage if isinstance(error, RottenBlockError) else None
                    run = RepairRun(view.disk, at, 1)
                    findings.append(Finding("rotten", run, str(error), damage))
    return findings


def read_blocks(view: View, block: int, count: int) -> bytes:
    """Whole blocks, the disk's last one padded with zeros; IntegrityError for a rotten one."""
    return view.read(block * BLOCK_BYTES, count * BLOCK_BYTES).ljust(count * BLOCK_BYTES, b"\0")
