"""Frames on the wire: header and extent table, readable by all; the payload sealed.

This module knows lengths and meanings, not keys: ``envelope.py`` seals and opens. The reader holds
no socket: bytes in, events out; its memory is bounded by one frame.

Source: FORMAT.md §4.
"""

import struct
import uuid
from dataclasses import dataclass
from enum import IntEnum

from replication.block_set import BLOCK_BYTES
from replication.bookmark import Stamp
from replication.errors import PeerError
from replication.extent import EXTENT_BYTES, Extent, pack_extents, unpack_extents

MAGIC = b"USF1"
VERSION = 1
PLAIN_BYTES_MAX = 1 << 20
EXTENT_COUNT_MAX = 1024
DISK_COUNT_MAX = 64
FRAME_NUMBER_MAX = (1 << 32) - 1
DIGEST_BYTES = 16
TAG_BYTES = 16
ATTEMPT_BYTES = 16
SEALED_BYTES_MAX = DIGEST_BYTES + PLAIN_BYTES_MAX

_HEADER = struct.Struct("<4sBBH16sIIQ16sIIII")
HEADER_BYTES = _HEADER.size
FRAME_BYTES_MAX = HEADER_BYTES + EXTENT_COUNT_MAX * EXTENT_BYTES + SEALED_BYTES_MAX + TAG_BYTES
assert HEADER_BYTES == 72
assert PLAIN_BYTES_MAX % BLOCK_BYTES == 0
assert PLAIN_BYTES_MAX // BLOCK_BYTES <= EXTENT_COUNT_MAX


class Codec(IntEnum):
    """How the payload was packed before it was sealed."""

    RAW = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What everyone may read of a frame; authenticated, not secret.

    stamp:        the changeset it belongs to.
    attempt:      the random salt of the attempt at it (ATTEMPT_BYTES).
    number:       the frame's number in the attempt, from 0; later frames win over earlier ones.
    plain_bytes:  payload before packing: the data of all data extents, in order.
    sealed_bytes: ciphertext, without the tag.
    """

    machine: uuid.UUID
    stamp: Stamp
    attempt: bytes
    number: int
    disk: int
    codec: Codec
    extents: tuple[Extent, ...]
    plain_bytes: int
    sealed_bytes: int

    def to_bytes(self) -> bytes:
        """Header and extent table: the associated data of the seal."""
        head = _HEADER.pack(
            MAGIC,
            VERSION,
            self.codec,
            self.disk,
            self.machine.bytes,
            self.stamp.generation,
            self.number,
            self.stamp.number,
            self.attempt,
            len(self.extents),
            self.plain_bytes,
            self.sealed_bytes,
            0,
        )
        return head + pack_extents(self.extents)


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole frame: header, the header's bytes as they came, ciphertext and tag."""

    header: FrameHeader
    associated: bytes
    sealed: bytes


class NeedData(IntEnum):
    """The reader has no whole frame yet."""

    NEED_DATA = 0


NEED_DATA = NeedData.NEED_DATA


@dataclass(frozen=True, slots=True)
class _Lengths:
    table_bytes: int
    sealed_bytes: int

    @property
    def total(self) -> int:
        return HEADER_BYTES + self.table_bytes + self.sealed_bytes + TAG_BYTES


class FrameReader:
    """A stream of frames as bytes; holds no socket, no clock and at most one frame.

    Feed ``receive_data`` with pieces of at most any size, then call ``next_event`` until it says
    NEED_DATA. After a PeerError the reader is unusable.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._lengths: _Lengths | None = None
        self._broken = False

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        self._buffer += data

    def next_event(self) -> Frame | NeedData:
        """Return the next whole frame.

        Raises PeerError on bad magic, version, codec, lengths or extents, as soon as the header
        shows it. Source: FORMAT.md §4.
        """
        if self._broken:
            raise PeerError("the stream of frames is broken; nothing more can be read from it")
        try:
            return self._next()
        except PeerError:
            self._broken = True
            raise

    def close(self) -> None:
        """The stream ends here; raise PeerError if it ends inside a frame."""
        if self._buffer:
            raise PeerError(f"the stream ends {len(self._buffer)} bytes into a frame")

    def _next(self) -> Frame | NeedData:
        if self._lengths is None:
            if len(self._buffer) < HEADER_BYTES:
                self._check_magic()
                return NEED_DATA
            self._lengths = _read_lengths(self._buffer)
        lengths = self._lengths
        if len(self._buffer) < lengths.total:
            return NEED_DATA
        payload_offset = HEADER_BYTES + lengths.table_bytes
        with memoryview(self._buffer) as view:
            associated = bytes(view[:payload_offset])
            sealed = bytes(view[payload_offset : lengths.total])
        del self._buffer[: lengths.total]
        self._lengths = None
        return Frame(read_header(associated), associated, sealed)

    def _check_magic(self) -> None:
        start = bytes(self._buffer[: len(MAGIC)])
        if not MAGIC.startswith(start):
            raise PeerError(f"a frame starts with {start!r}, not {MAGIC!r}")


def _read_lengths(head: bytes | bytearray) -> _Lengths:
    """Check what bounds the frame's size before any of it is waited for."""
    fields = _HEADER.unpack_from(head)
    magic, version = fields[:2]
    extent_count, plain_bytes, sealed_bytes, reserved = fields[9:]
    if magic != MAGIC:
        raise PeerError(f"a frame starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise PeerError(f"a frame has version {version}; this reader knows {VERSION}")
    if not 1 <= extent_count <= EXTENT_COUNT_MAX:
        raise PeerError(f"a frame declares {extent_count} extents, not 1 to {EXTENT_COUNT_MAX}")
    if plain_bytes > PLAIN_BYTES_MAX or plain_bytes % BLOCK_BYTES:
        raise PeerError(f"a frame declares {plain_bytes} bytes of data")
    if not DIGEST_BYTES <= sealed_bytes <= DIGEST_BYTES + plain_bytes:
        raise PeerError(f"a frame declares {sealed_bytes} sealed bytes for {plain_bytes} of data")
    if reserved:
        raise PeerError("a frame has bits set that are reserved")
    return _Lengths(extent_count * EXTENT_BYTES, sealed_bytes)


def read_header(associated: bytes) -> FrameHeader:
    """Read a frame's header and extent table, whole; raise PeerError on anything off."""
    if len(associated) < HEADER_BYTES:
        raise PeerError(f"a frame header of {len(associated)} bytes is cut off")
    lengths = _read_lengths(associated)
    if len(associated) != HEADER_BYTES + lengths.table_bytes:
        raise PeerError("a frame header does not have the length that it declares")
    fields = _HEADER.unpack_from(associated)
    _, _, codec, disk, machine, generation, number, changeset, attempt, _, plain_bytes, _, _ = (
        fields
    )
    extents = unpack_extents(memoryview(associated)[HEADER_BYTES:])
    if codec not in (Codec.RAW, Codec.ZSTD):
        raise PeerError(f"a frame has the unknown codec {codec}")
    if disk >= DISK_COUNT_MAX:
        raise PeerError(f"a frame is for disk {disk}; a machine has at most {DISK_COUNT_MAX}")
    if generation == 0 or changeset == 0:
        raise PeerError(f"a frame is for changeset {generation}.{changeset}; both count from 1")
    if sum(extent.data_bytes for extent in extents) != plain_bytes:
        raise PeerError(f"a frame's extents do not add up to {plain_bytes} bytes of data")
    if codec == Codec.RAW and lengths.sealed_bytes != DIGEST_BYTES + plain_bytes:
        raise PeerError("a raw frame's sealed length does not fit its data")
    return FrameHeader(
        machine=uuid.UUID(bytes=machine),
        stamp=Stamp(generation, changeset),
        attempt=attempt,
        number=number,
        disk=disk,
        codec=Codec(codec),
        extents=extents,
        plain_bytes=plain_bytes,
        sealed_bytes=lengths.sealed_bytes,
    )
