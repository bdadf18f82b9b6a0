"""What the tests of the formats start from: strategies, and one whole frame and manifest."""

import os
import random
import uuid

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from replication.block_set import BLOCK_BYTES
from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp
from replication.envelope import AttemptSealer
from replication.extent import Extent
from replication.frame import EXTENT_COUNT_MAX, PLAIN_BYTES_MAX
from replication.manifest import AuditDigest, Manifest, SegmentEntry

quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)

DATA_KEY = bytes(range(32))
MACHINE = uuid.UUID("7d444840-9dc0-11d1-b245-5ffdce74fad2")
STAMP = Stamp(3, 1_000_000_007)

stamps = st.builds(Stamp, st.integers(1, (1 << 32) - 1), st.integers(1, (1 << 63) - 1))
digests = st.binary(min_size=16, max_size=16)
uint63 = st.integers(0, (1 << 63) - 1)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@st.composite
def extent_lists(draw: st.DrawFn, data_blocks_max: int = 8) -> tuple[Extent, ...]:
    """Extents as a frame may carry them: ascending, apart or touching, few blocks of data."""
    extents, block, room = [], 0, data_blocks_max
    for _ in range(draw(st.integers(1, 12))):
        zero = room == 0 or draw(st.booleans())
        block += draw(st.one_of(st.just(0), st.integers(0, 1 << 30)))
        count = draw(st.integers(1, (1 << 20) if zero else room))
        room -= 0 if zero else count
        extents.append(Extent(block, count, zero))
        block += count
    return tuple(extents)


def data_of(extents: tuple[Extent, ...], seed: int) -> bytes:
    """As much as the extents carry; halves of blocks shrink, others do not."""
    source = random.Random(seed)
    total = sum(extent.data_bytes for extent in extents)
    if seed % 2:
        return source.randbytes(total)
    return b"".join(source.randbytes(100) * 40 + bytes(96) for _ in range(total // BLOCK_BYTES))


def new_sealer(stamp: Stamp = STAMP) -> AttemptSealer:
    return AttemptSealer(DATA_KEY, MACHINE, stamp)


def seal_sample(sealer: AttemptSealer, *, blocks: int = 1, random_data: bool = False) -> bytes:
    """One small frame: a zero extent and ``blocks`` of data."""
    assert 0 <= blocks * BLOCK_BYTES <= PLAIN_BYTES_MAX
    assert blocks < EXTENT_COUNT_MAX
    extents = [Extent(5, 7, zero=True)]
    if blocks:
        extents.append(Extent(20, blocks))
    data = os.urandom(blocks * BLOCK_BYTES) if random_data else b"Understudy" * 409 + b"......"
    data = data if random_data else data * blocks
    return sealer.seal_frame(sealer.next_number(), 2, extents, data)


def sample_manifest(sealer: AttemptSealer) -> Manifest:
    return Manifest(
        machine=sealer.machine,
        bookmark=Bookmark(sealer.stamp, 1_700_000_000_000_000_000, Consistency.CRASH, "héld"),
        since=sealer.stamp.number - 1,
        attempt=sealer.attempt,
        disks=(DiskShape(0, "/dev/sda", 10 * 512), DiskShape(2, "data", 1 << 40)),
        segments=(SegmentEntry(1, 4096, bytes(16)),),
        changed_bytes=8 * BLOCK_BYTES,
        captured_ns=1_699_999_999_000_000_000,
        pause_ns=40_000_000,
        repaired=4,
        applied=Stamp(3, 12),
        audit=(AuditDigest(2, 77, bytes(range(16))),),
    )
