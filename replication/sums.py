"""The sums of a store's state, sealed: what a resync compares the source's disks with.

Level 1 has one sum per MiB, level 2 one per chunk. A part holds PART_SUMS of them at most, so that
who asks for one and who makes one need little memory. Each part that is sealed gets a salt, and by
it a key, of its own: one that is made again for the same place may hold other sums (more blocks
may be known to be damaged by then), and no pair of key and nonce may occur twice.

*Basis*: 16 random bytes, chosen anew by the applier whenever a resync begins. It names the state of
that one store: no other store and no older copy of it takes changesets that count from there.

Source: FORMAT.md §10.
"""

import struct
import uuid
from dataclasses import dataclass

import xxhash
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from replication.block_set import BLOCK_BYTES, BLOCK_COUNT_MAX
from replication.bookmark import Stamp
from replication.checksum import CHUNK_BYTES, DIGEST_BYTES
from replication.envelope import DATA_KEY_BYTES, new_salt
from replication.errors import ConfigError, IntegrityError, PeerError
from replication.frame import DISK_COUNT_MAX, TAG_BYTES
from replication.manifest import BASIS_BYTES

MAGIC = b"USC1"
VERSION = 1
MIB_BYTES = 1 << 20
MIB_CHUNKS = MIB_BYTES // CHUNK_BYTES
LEVELS = (1, 2)
PART_SUMS = 4096
"""A part covers 4 GiB of a disk at level 1, 256 MiB at level 2."""

PART_PLAIN_BYTES_MAX = PART_SUMS * DIGEST_BYTES
_PACKED_BYTES_MAX = PART_PLAIN_BYTES_MAX + 1024  # zstd adds some bytes to what does not shrink
_UNIT_BYTES = {1: MIB_BYTES, 2: CHUNK_BYTES}
_SIZE_BYTES_MAX = BLOCK_COUNT_MAX * BLOCK_BYTES

_HEADER = struct.Struct("<4sBBH16sIIQ16s16sQQI4s")
_INFO = struct.Struct("<18s16sIQ")
_LABEL = b"understudy sums v1"
_NONCE = struct.Struct("<BBHQ")
_DOMAIN = 3
SUMS_BYTES_MAX = _HEADER.size + _PACKED_BYTES_MAX + TAG_BYTES
assert _HEADER.size == 96
assert _NONCE.size == 12
assert len(_LABEL) == 18

PART_NUMBER_MAX = _SIZE_BYTES_MAX // CHUNK_BYTES // PART_SUMS


@dataclass(frozen=True, slots=True)
class SumsPlace:
    """Which sums: all of it is authenticated with them.

    stamp:      the store's head when they were made, the changeset that begins the resync.
    size_bytes: of the disk.
    """

    machine: uuid.UUID
    stamp: Stamp
    basis: bytes
    disk: int
    level: int
    part: int
    size_bytes: int

    @property
    def sum_count(self) -> int:
        """How many sums the part has."""
        return min(PART_SUMS, sum_count(self.size_bytes, self.level) - self.part * PART_SUMS)

    @property
    def first_byte(self) -> int:
        """Where on the disk the part begins."""
        return self.part * PART_SUMS * _UNIT_BYTES[self.level]


def sum_count(size_bytes: int, level: int) -> int:
    """How many sums of ``level`` a disk has."""
    return -(-size_bytes // _UNIT_BYTES[level])


def part_count(size_bytes: int, level: int) -> int:
    """How many parts of ``level`` a disk has."""
    return -(-sum_count(size_bytes, level) // PART_SUMS)


def mib_sum(chunk_digests: bytes | memoryview) -> bytes:
    """The level-1 sum over the digests of a MiB's chunks, as many as the disk has there."""
    assert 0 < len(chunk_digests) <= MIB_CHUNKS * DIGEST_BYTES
    assert len(chunk_digests) % DIGEST_BYTES == 0
    return xxhash.xxh3_128_digest(chunk_digests)


def mib_sums(chunk_digests: bytes) -> bytes:
    """The level-1 sums over a run of chunk digests that begins at a MiB."""
    step = MIB_CHUNKS * DIGEST_BYTES
    view = memoryview(chunk_digests)
    return b"".join(mib_sum(view[at : at + step]) for at in range(0, len(view), step))


def seal_sums(data_key: bytes, place: SumsPlace, sums: bytes) -> bytes:
    """A part as it lies in the cache, under a fresh salt."""
    assert len(sums) == place.sum_count * DIGEST_BYTES > 0
    assert len(place.basis) == BASIS_BYTES
    salt = new_salt()
    packed = zstandard.ZstdCompressor(level=1).compress(sums)
    head = _head(place, salt, len(packed))
    return head + _key(data_key, place, salt).encrypt(_nonce(place), packed, head)


def open_sums(data_key: bytes, place: SumsPlace, data: bytes) -> bytes:
    """The sums of ``place``, 16 bytes each.

    Raises PeerError on what is no such part, IntegrityError on one that was altered, belongs
    somewhere else, or was sealed under another key. Memory is bounded by the part's size.
    """
    if not _HEADER.size + TAG_BYTES < len(data) <= SUMS_BYTES_MAX:
        raise PeerError(f"a part of sums cannot have {len(data)} bytes")
    fields = _HEADER.unpack_from(data)
    magic, version, salt, packed_bytes = fields[0], fields[1], fields[9], fields[12]
    if magic != MAGIC or version != VERSION:
        raise PeerError(f"not sums of version {VERSION}: {magic!r} {version}")
    head = data[: _HEADER.size]
    if head != _head(place, salt, packed_bytes):
        raise IntegrityError(f"sums of another place or time stand where {_name(place)} belong")
    if len(data) != _HEADER.size + packed_bytes + TAG_BYTES:
        raise PeerError(f"{_name(place)} do not have the length that they declare")
    try:
        packed = _key(data_key, place, salt).decrypt(_nonce(place), data[_HEADER.size :], head)
    except InvalidTag as error:
        raise IntegrityError(f"{_name(place)} were altered: their tag does not match") from error
    return _unpack(packed, place)


def _unpack(packed: bytes, place: SumsPlace) -> bytes:
    wanted = place.sum_count * DIGEST_BYTES
    try:
        if zstandard.frame_content_size(packed) != wanted:
            raise PeerError(f"{_name(place)} unpack to another size than {wanted} bytes")
        return zstandard.ZstdDecompressor(max_window_size=MIB_BYTES).decompress(
            packed, max_output_size=wanted, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{_name(place)} do not unpack: {error}") from error


def _head(place: SumsPlace, salt: bytes, packed_bytes: int) -> bytes:
    assert place.level in LEVELS
    assert 0 <= place.disk < DISK_COUNT_MAX
    return _HEADER.pack(
        MAGIC,
        VERSION,
        place.level,
        place.disk,
        place.machine.bytes,
        place.stamp.generation,
        place.sum_count,
        place.stamp.number,
        place.basis,
        salt,
        place.part,
        place.size_bytes,
        packed_bytes,
        bytes(4),
    )


def _key(data_key: bytes, place: SumsPlace, salt: bytes) -> AESGCM:
    if len(data_key) != DATA_KEY_BYTES:
        raise ConfigError(f"a data key has {len(data_key)} bytes, not {DATA_KEY_BYTES}")
    info = _INFO.pack(_LABEL, place.machine.bytes, place.stamp.generation, place.stamp.number)
    return AESGCM(HKDF(SHA256(), length=32, salt=salt, info=info).derive(data_key))


def _nonce(place: SumsPlace) -> bytes:
    return _NONCE.pack(_DOMAIN, place.level, place.disk, place.part)


def _name(place: SumsPlace) -> str:
    return f"the sums of disk {place.disk}, level {place.level}, part {place.part} at {place.stamp}"
