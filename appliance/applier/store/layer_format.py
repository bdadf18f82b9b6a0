"""The bytes of a layer file: header page, index, block digests, description.

Pure: bytes in, values out. Every section has its xxh3-128 in the header and the header has its
own, so that any flipped bit is an IntegrityError and never a wrong block.

Source: docs/STORE.md §3.
"""

from __future__ import annotations

import json
import struct
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from appliance.applier.store.extents import DISK_INDEX_MAX, KEY_SHIFT, Extents
from replication.block_set import BLOCK_BYTES, BLOCK_COUNT_MAX
from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp
from replication.checksum import DIGEST_BYTES
from replication.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER_BYTES = 4096
ATTEMPT_BYTES = 16
DESCRIPTION_BYTES_MAX = 1 << 20
EXTENT_COUNT_MAX = 1 << 24
"""Extents of one layer file, merged ones included: 512 MiB of index."""

_MAGIC = b"USTLAYER"
_VERSION = 1
_FIXED = struct.Struct("<8sI4x16sQQQQQQqB7x16sqQQQ16sQ16sQQ16s")
_DIGEST_AT = HEADER_BYTES - DIGEST_BYTES
_CONSISTENCY_CODES = {Consistency.NONE: 0, Consistency.CRASH: 1, Consistency.APP: 2}
_CONSISTENCIES = {code: consistency for consistency, code in _CONSISTENCY_CODES.items()}
_INDEX = np.dtype(
    [("disk", "<u4"), ("pad", "<u4"), ("block", "<u8"), ("count", "<u8"), ("data", "<u8")]
)
INDEX_ENTRY_BYTES = _INDEX.itemsize
_ZERO_ON_DISK = (1 << 64) - 1

assert _FIXED.size <= _DIGEST_AT
assert INDEX_ENTRY_BYTES == 32


@dataclass(frozen=True, slots=True)
class Section:
    """Where a section lies in the file, and its xxh3-128."""

    offset: int
    size_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class LayerHeader:
    """What the first page says.

    first, last: positions that the layer covers; equal until layers are merged.
    parent:      stamp of the position before ``first``; 0.0 when there is none.
    bookmark:    of ``last``.
    attempt:     salt of the attempt that ``last`` was applied from.
    applied_ns:  when ``last`` was applied, nanoseconds since 1970 UTC.
    data_blocks: in the data area, which begins at HEADER_BYTES.
    """

    machine: uuid.UUID
    first: int
    last: int
    parent: Stamp
    bookmark: Bookmark
    attempt: bytes
    applied_ns: int
    disks: tuple[DiskShape, ...]
    data_blocks: int
    extent_count: int
    index: Section
    digests: Section


def data_offset(data_block: int) -> int:
    """Where a data block lies in the file."""
    return HEADER_BYTES + data_block * BLOCK_BYTES


def pack_index(extents: Extents) -> bytes:
    table = np.zeros(len(extents), _INDEX)
    table["disk"] = extents.disk
    table["block"] = extents.block
    table["count"] = extents.count
    table["data"] = extents.data.astype(np.uint64)  # ZERO, which is -1, becomes _ZERO_ON_DISK
    return table.tobytes()


def unpack_index(raw: bytes | bytearray, header: LayerHeader, where: str) -> Extents:
    """The extents of a layer; IntegrityError when they are not what the header promises."""
    if xxhash.xxh3_128_digest(raw) != header.index.digest:
        raise _rotten(where, "its index does not have the digest that its header declares")
    table = np.frombuffer(raw, _INDEX)
    zero = table["data"] == _ZERO_ON_DISK
    in_bounds = (
        (table["disk"] <= DISK_INDEX_MAX)
        & (table["pad"] == 0)
        & (table["block"] < BLOCK_COUNT_MAX)
        & (table["count"] <= BLOCK_COUNT_MAX)
        & (zero | (table["data"] < BLOCK_COUNT_MAX))
    )
    if not in_bounds.all():
        raise _rotten(where, "its index names places that no disk has")
    start = (table["disk"].astype(np.int64) << KEY_SHIFT) | table["block"].astype(np.int64)
    # uint64's greatest value becomes -1, which is ZERO.
    extents = Extents(start, table["count"].astype(np.int64), table["data"].astype(np.int64))
    with_data = extents.with_data()
    if (with_data.data + with_data.count > header.data_blocks).any():
        raise _rotten(where, "its index names data that it does not hold")
    if not extents.is_well_formed():
        raise _rotten(where, "its index is not in order")
    return extents


def pack_description(bookmark: Bookmark, disks: Sequence[DiskShape]) -> bytes:
    tree = {"reason": bookmark.reason, "disks": shapes_to_json(disks)}
    return json.dumps(tree, separators=(",", ":"), sort_keys=True).encode()


def shapes_to_json(disks: Sequence[DiskShape]) -> list[dict[str, Any]]:
    return [{"index": d.index, "name": d.name, "size_bytes": d.size_bytes} for d in disks]


def shapes_from_json(tree: list[dict[str, Any]]) -> tuple[DiskShape, ...]:
    """Raises KeyError, TypeError or ValueError when ``tree`` is something else."""
    return tuple(DiskShape(int(d["index"]), str(d["name"]), int(d["size_bytes"])) for d in tree)


def pack_header(header: LayerHeader, description: Section) -> bytes:
    bookmark = header.bookmark
    fixed = _FIXED.pack(
        _MAGIC,
        _VERSION,
        header.machine.bytes,
        header.first,
        header.last,
        header.parent.generation,
        header.parent.number,
        bookmark.stamp.generation,
        bookmark.stamp.number,
        bookmark.time_ns,
        _CONSISTENCY_CODES[bookmark.consistency],
        header.attempt,
        header.applied_ns,
        header.data_blocks,
        header.extent_count,
        header.index.offset,
        header.index.digest,
        header.digests.offset,
        header.digests.digest,
        description.offset,
        description.size_bytes,
        description.digest,
    )
    page = fixed.ljust(_DIGEST_AT, b"\0")
    return page + xxhash.xxh3_128_digest(page)


def description_section(page: bytes, where: str) -> Section:
    """Check the header page and tell where the description lies: needed for ``unpack_header``."""
    if len(page) != HEADER_BYTES:
        raise _rotten(where, f"it ends after {len(page)} bytes, inside its header")
    if xxhash.xxh3_128_digest(page[:_DIGEST_AT]) != page[_DIGEST_AT:]:
        raise _rotten(where, "its header does not have its own digest")
    fields = _FIXED.unpack_from(page)
    if fields[0] != _MAGIC or fields[1] != _VERSION:
        raise _rotten(where, f"it is not a layer of version {_VERSION}")
    offset, size_bytes, digest = fields[-3:]
    if size_bytes > DESCRIPTION_BYTES_MAX:
        raise _rotten(where, f"its description declares {size_bytes} bytes")
    return Section(offset, size_bytes, digest)


def unpack_header(page: bytes, description: bytes, where: str) -> LayerHeader:
    """Read a header page and its description, both checked against their digests."""
    section = description_section(page, where)
    if xxhash.xxh3_128_digest(description) != section.digest:
        raise _rotten(where, "its description does not have the digest that its header declares")
    (
        machine,
        first,
        last,
        parent_generation,
        parent_number,
        generation,
        number,
        time_ns,
        consistency,
        attempt,
        applied_ns,
        data_blocks,
        extent_count,
        index_offset,
        index_digest,
        digests_offset,
        digests_digest,
    ) = _FIXED.unpack_from(page)[2:-3]
    if not 1 <= first <= last or consistency not in _CONSISTENCIES:
        raise _rotten(where, "its header contradicts itself")
    if data_blocks > BLOCK_COUNT_MAX or extent_count > EXTENT_COUNT_MAX:
        raise _rotten(where, f"it declares {data_blocks} blocks in {extent_count} extents")
    try:
        tree = json.loads(description)
        disks = shapes_from_json(tree["disks"])
        reason = str(tree["reason"])
    except (KeyError, TypeError, ValueError) as error:
        raise _rotten(where, f"its description is not as specified: {error}") from error
    return LayerHeader(
        machine=uuid.UUID(bytes=machine),
        first=first,
        last=last,
        parent=Stamp(parent_generation, parent_number),
        bookmark=Bookmark(Stamp(generation, number), time_ns, _CONSISTENCIES[consistency], reason),
        attempt=attempt,
        applied_ns=applied_ns,
        disks=disks,
        data_blocks=data_blocks,
        extent_count=extent_count,
        index=Section(index_offset, extent_count * INDEX_ENTRY_BYTES, index_digest),
        digests=Section(digests_offset, data_blocks * DIGEST_BYTES, digests_digest),
    )


def _rotten(where: str, what: str) -> IntegrityError:
    return IntegrityError(
        f"the layer {where} is unusable: {what}",
        hint="the disk under the store has lost or changed bytes; a resync brings fresh ones",
    )
