"""A second reader, written from FORMAT.md alone: what it cannot read, the page does not say.

It shares no code with ``replication``, which only writes here.
"""

import json
import struct
import uuid
from dataclasses import dataclass

import xxhash
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from replication.block_set import BlockSet
from replication.checksum import block_digests, chunk_digest
from replication.extent import Extent
from tests.replication.samples import DATA_KEY, data_of, new_sealer, sample_manifest


def key_of(machine: bytes, generation: int, number: int, attempt: bytes) -> AESGCM:
    """§5."""
    info = b"understudy attempt v1" + machine + struct.pack("<IQ", generation, number)
    return AESGCM(HKDF(SHA256(), 32, attempt, info).derive(DATA_KEY))


@dataclass
class ReadFrame:
    disk: int
    codec: int
    number: int
    data: dict[int, bytes]
    zeros: list[tuple[int, int]]
    size: int


def read_frame(stream: bytes) -> ReadFrame:
    """§4, offset by offset."""
    assert stream[0:4] == b"USF1"
    assert stream[4] == 1
    codec = stream[5]
    (disk,) = struct.unpack_from("<H", stream, 6)
    machine = stream[8:24]
    (generation, number) = struct.unpack_from("<II", stream, 24)
    (changeset,) = struct.unpack_from("<Q", stream, 32)
    attempt = stream[40:56]
    extents, plain, sealed, zero = struct.unpack_from("<IIII", stream, 56)
    assert zero == 0
    associated = stream[: 72 + 16 * extents]
    end = len(associated) + sealed + 16
    nonce = b"\x01" + bytes(7) + struct.pack("<I", number)
    key = key_of(machine, generation, changeset, attempt)
    payload = key.decrypt(nonce, stream[len(associated) : end], associated)
    digest, packed = payload[:16], payload[16:]
    data = packed if codec == 0 else zstandard.decompress(packed)
    assert len(data) == plain
    assert xxhash.xxh3_128(data).digest() == digest
    blocks, zeros, at = {}, [], 0
    for index in range(extents):
        block, count, kind = struct.unpack_from("<QII", stream, 72 + 16 * index)
        if kind == 1:
            zeros.append((block, count))
            continue
        for offset in range(count):
            blocks[block + offset] = data[at : at + 4096]
            at += 4096
    assert at == plain
    return ReadFrame(disk, codec, number, blocks, zeros, end)


def test_frames_are_read_from_the_page() -> None:
    sealer = new_sealer()
    extents = (Extent(3, 2), Extent(5, 9, zero=True), Extent(100, 1))
    stream, sent = b"", []
    for seed in (0, 1):
        sent.append(data_of(extents, seed))
        stream += sealer.seal_frame(sealer.next_number(), 2, extents, sent[-1])
    for number, data in enumerate(sent):
        frame = read_frame(stream)
        assert (frame.disk, frame.number, frame.codec) == (2, number, 1 - number)
        assert frame.zeros == [(5, 9)]
        assert frame.data == {3: data[:4096], 4: data[4096:8192], 100: data[8192:]}
        stream = stream[frame.size :]
    assert not stream


def test_manifest_is_read_from_the_page() -> None:
    sealer = new_sealer()
    made = sample_manifest(sealer)
    data = made.seal(sealer)
    assert data[:8] == b"USM1\x01\0\0\0"
    public_bytes, sealed_bytes = struct.unpack_from("<II", data, 8)
    assert len(data) == 16 + public_bytes + sealed_bytes + 16
    public = json.loads(data[16 : 16 + public_bytes].decode())
    assert public == {
        "machine": str(made.machine),
        "generation": made.stamp.generation,
        "number": made.stamp.number,
        "since": made.since,
        "attempt": made.attempt.hex(),
        "time_ns": 1_700_000_000_000_000_000,
        "consistency": "crash",
        "reason": "héld",
        "captured_ns": 1_699_999_999_000_000_000,
        "pause_ns": 40_000_000,
        "initial": False,
        "repaired": 4,
        "applied_generation": 3,
        "applied_number": 12,
        "tracker": "ebpf",
        "basis": "00" * 16,
        "origin": "00" * 16,
        "resync": False,
        "changed_bytes": 32768,
        "disks": [
            {"disk": 0, "name": "/dev/sda", "size_bytes": 5120},
            {"disk": 2, "name": "data", "size_bytes": 1 << 40},
        ],
        "segments": [{"frames": 1, "size_bytes": 4096, "digest": "00" * 16}],
    }
    machine = uuid.UUID(public["machine"]).bytes
    attempt = bytes.fromhex(public["attempt"])
    key = key_of(machine, public["generation"], public["number"], attempt)
    sealed_at = 16 + public_bytes
    opened = key.decrypt(b"\x02" + bytes(11), data[sealed_at:], data[:sealed_at])
    assert len(opened) == sealed_bytes
    assert json.loads(opened) == {
        "audit": [{"disk": 2, "chunk": 77, "digest": "000102030405060708090a0b0c0d0e0f"}]
    }


def test_block_set_is_read_from_the_page() -> None:
    made = BlockSet(1001)
    made.add_run(3, 200)
    made.add_run(1000, 1)
    data = made.to_bytes()
    assert data[:8] == b"USB1\x01\0\0\0"
    block_count, body_bytes = struct.unpack_from("<QQ", data, 8)
    assert (block_count, len(data)) == (1001, 40 + body_bytes)
    bitmap = zstandard.decompress(data[40:])
    assert len(bitmap) == -(-block_count // 64) * 8
    assert xxhash.xxh3_128(data[:16] + bitmap).digest() == data[24:40]
    found = {block for block in range(len(bitmap) * 8) if bitmap[block // 8] >> block % 8 & 1}
    assert found == {*range(3, 203), 1000}


def test_digests_are_made_from_the_page() -> None:
    blocks = [b"\x07" * 4096, bytes(4096), b"short".ljust(4096, b"\0")]
    digests = [xxhash.xxh3_128_digest(block) for block in blocks]
    digests[1] = bytes(16)
    assert block_digests(b"".join(blocks)) == b"".join(digests)
    assert chunk_digest(b"".join(digests)) == xxhash.xxh3_128_digest(b"".join(digests))
