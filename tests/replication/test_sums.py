"""Parts of sums: whole, cut off, flipped, moved, and written from FORMAT.md alone."""

import random
import struct
import uuid
from dataclasses import replace

import pytest
import xxhash
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from replication.block_set import BLOCK_COUNT_MAX
from replication.bookmark import Stamp
from replication.errors import ConfigError, IntegrityError, PeerError
from replication.sums import (
    PART_SUMS,
    SUMS_BYTES_MAX,
    SumsPlace,
    mib_sum,
    mib_sums,
    open_sums,
    part_count,
    seal_sums,
    sum_count,
)
from tests.replication.samples import DATA_KEY, MACHINE, quick

PLACE = SumsPlace(MACHINE, Stamp(3, 1), b"b" * 16, 2, 2, 0, 5 * 65536 + 512)
SUMS = random.Random(4).randbytes(6 * 16)


def test_what_was_sealed_is_opened() -> None:
    assert open_sums(DATA_KEY, PLACE, seal_sums(DATA_KEY, PLACE, SUMS)) == SUMS


def test_a_second_reader_follows_the_page() -> None:
    sealed = seal_sums(DATA_KEY, PLACE, SUMS)
    head, salt, packed_bytes = sealed[:96], sealed[56:72], int.from_bytes(sealed[88:92], "little")
    assert head == struct.pack(
        "<4sBBH16sIIQ16s16sQQI4x",
        *(b"USC1", 1, 2, 2, MACHINE.bytes, 3, 6, 1),
        *(b"b" * 16, salt, 0, 5 * 65536 + 512, packed_bytes),
    )
    info = b"understudy sums v1" + MACHINE.bytes + struct.pack("<IQ", 3, 1)
    key = AESGCM(HKDF(SHA256(), 32, salt, info).derive(DATA_KEY))
    nonce = struct.pack("<BBHQ", 3, 2, 2, 0)
    packed = key.decrypt(nonce, sealed[96:], head)
    assert len(packed) == packed_bytes
    assert zstandard.ZstdDecompressor().decompress(packed) == SUMS


def test_each_sealing_has_a_salt_of_its_own() -> None:
    made = {seal_sums(DATA_KEY, PLACE, SUMS)[56:72] for _ in range(50)}
    assert len(made) == 50


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"machine": uuid.UUID(int=9)},
        {"stamp": Stamp(3, 2)},
        {"stamp": Stamp(4, 1)},
        {"basis": b"c" * 16},
        {"disk": 1},
        {"level": 1, "size_bytes": 6 << 20},
        {"size_bytes": 6 * 65536},
        {"part": 1, "size_bytes": (PART_SUMS + 6) * 65536},
    ],
)
def test_sums_of_another_place_are_refused(elsewhere: dict[str, object]) -> None:
    sealed = seal_sums(DATA_KEY, PLACE, SUMS)
    with pytest.raises(IntegrityError):
        open_sums(DATA_KEY, replace(PLACE, **elsewhere), sealed)  # type: ignore[arg-type]


@quick
@given(st.data())
def test_a_flipped_bit_is_refused(data: st.DataObject) -> None:
    whole = bytearray(seal_sums(DATA_KEY, PLACE, SUMS))
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises((IntegrityError, PeerError)):
        open_sums(DATA_KEY, PLACE, bytes(whole))


@quick
@given(st.data())
def test_what_is_cut_off_or_longer_is_refused(data: st.DataObject) -> None:
    whole = seal_sums(DATA_KEY, PLACE, SUMS)
    length = data.draw(st.integers(0, len(whole) - 1))
    for wrong in (whole[:length], whole + b"\0", b"", bytes(SUMS_BYTES_MAX + 1)):
        with pytest.raises((IntegrityError, PeerError)):
            open_sums(DATA_KEY, PLACE, wrong)


def test_another_key_opens_nothing() -> None:
    sealed = seal_sums(DATA_KEY, PLACE, SUMS)
    with pytest.raises(IntegrityError):
        open_sums(bytes(32), PLACE, sealed)
    with pytest.raises(ConfigError):
        open_sums(b"short", PLACE, sealed)


def test_largest_part_fits_its_limit() -> None:
    place = replace(PLACE, size_bytes=PART_SUMS * 65536)
    sums = random.Random(5).randbytes(PART_SUMS * 16)
    assert place.sum_count == PART_SUMS
    assert len(seal_sums(DATA_KEY, place, sums)) <= SUMS_BYTES_MAX


@given(st.integers(1, BLOCK_COUNT_MAX * 4096 // 512).map(lambda sectors: sectors * 512))
def test_parts_cover_a_disk_of_any_size(size_bytes: int) -> None:
    for level, unit in ((1, 1 << 20), (2, 65536)):
        count = sum_count(size_bytes, level)
        assert (count - 1) * unit < size_bytes <= count * unit
        last = replace(
            PLACE, level=level, size_bytes=size_bytes, part=part_count(size_bytes, level) - 1
        )
        assert 1 <= last.sum_count <= PART_SUMS
        assert last.part * PART_SUMS + last.sum_count == count
        assert last.first_byte < size_bytes


def test_large_sums_are_over_the_small_ones() -> None:
    digests = random.Random(6).randbytes(20 * 16)
    assert mib_sums(digests) == mib_sum(digests[:256]) + mib_sum(digests[256:])
    assert mib_sum(digests[:256]) == xxhash.xxh3_128_digest(digests[:256])
