import struct
import uuid
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp
from replication.document import Document, encode
from replication.envelope import AttemptSealer
from replication.errors import IntegrityError, PeerError
from replication.manifest import (
    AuditDigest,
    Manifest,
    SegmentEntry,
    open_manifest,
    read_public,
)
from tests.replication.samples import (
    DATA_KEY,
    digests,
    new_sealer,
    quick,
    sample_manifest,
    uint63,
    words,
)


@st.composite
def manifests(draw: st.DrawFn) -> tuple[Manifest, AttemptSealer]:
    stamp = Stamp(draw(st.integers(1, (1 << 32) - 1)), draw(st.integers(1, (1 << 63) - 1)))
    sealer = AttemptSealer(DATA_KEY, draw(st.uuids()), stamp)
    indexes = sorted(draw(st.sets(st.integers(0, 63), min_size=1, max_size=5)))
    time_ns = draw(uint63)
    made = Manifest(
        machine=sealer.machine,
        bookmark=Bookmark(stamp, time_ns, draw(st.sampled_from(Consistency)), draw(words)),
        since=draw(st.integers(0, stamp.number - 1)),
        attempt=sealer.attempt,
        disks=tuple(
            DiskShape(index, draw(words), 512 * draw(st.integers(1, 1 << 39))) for index in indexes
        ),
        segments=tuple(
            draw(
                st.lists(
                    st.builds(
                        SegmentEntry, st.integers(1, 9999), st.integers(1, 32 << 20), digests
                    ),
                    max_size=5,
                )
            )
        ),
        changed_bytes=draw(uint63),
        captured_ns=draw(st.integers(0, time_ns)),
        pause_ns=draw(uint63),
        initial=draw(st.booleans()),
        repaired=draw(uint63),
        applied=Stamp(draw(st.integers(0, (1 << 32) - 1)), draw(uint63)),
        tracker=draw(st.sampled_from(["ebpf", "scan"])),
        audit=tuple(
            draw(st.lists(st.builds(AuditDigest, st.integers(0, 63), uint63, digests), max_size=5))
        ),
    )
    return made, sealer


@quick
@given(manifests())
def test_manifest_round_trips(pair: tuple[Manifest, AttemptSealer]) -> None:
    made, sealer = pair
    data = made.seal(sealer)
    opened, key = open_manifest(data, DATA_KEY)
    assert opened == made
    assert (key.machine, key.stamp, key.attempt) == (made.machine, made.stamp, made.attempt)
    assert read_public(data) == replace(made, audit=None)


def test_every_flipped_bit_is_refused() -> None:
    sealer = new_sealer()
    data = sample_manifest(sealer).seal(sealer)
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((PeerError, IntegrityError)):
            open_manifest(bytes(flipped), DATA_KEY)


def test_every_cut_and_anything_behind_is_refused() -> None:
    sealer = new_sealer()
    data = sample_manifest(sealer).seal(sealer)
    for wrong in (*(data[:size] for size in range(len(data))), data + b"\0"):
        with pytest.raises(PeerError):
            read_public(wrong)
        with pytest.raises(PeerError):
            open_manifest(wrong, DATA_KEY)


def test_wrong_key_is_refused() -> None:
    sealer = new_sealer()
    data = sample_manifest(sealer).seal(sealer)
    with pytest.raises(IntegrityError, match="altered"):
        open_manifest(data, bytes(32))


def test_sealed_part_of_another_manifest_is_refused() -> None:
    datas = []
    for _ in range(2):
        sealer = new_sealer()
        datas.append(sample_manifest(sealer).seal(sealer))
    (public_bytes,) = struct.unpack_from("<I", datas[0], 8)
    with pytest.raises(IntegrityError):
        open_manifest(datas[0][: 16 + public_bytes] + datas[1][16 + public_bytes :], DATA_KEY)


def test_audit_sample_is_not_readable_without_the_key() -> None:
    sealer = new_sealer()
    made = sample_manifest(sealer)
    data = made.seal(sealer)
    assert made.audit
    assert b"audit" not in data
    assert made.audit[0].digest.hex().encode() not in data
    assert read_public(data).audit is None


def test_lengths_too_big_are_refused_by_the_header() -> None:
    for public_bytes, secret_bytes in (((4 << 20) + 1, 0), (2, (1 << 20) + 1)):
        head = struct.pack("<4sB3xII", b"USM1", 1, public_bytes, secret_bytes)
        with pytest.raises(PeerError, match="too many"):
            read_public(head)


@quick
@given(st.binary(max_size=200), st.booleans())
def test_garbage_is_refused(garbage: bytes, with_head: bool) -> None:
    if with_head:
        garbage = struct.pack("<4sB3xII", b"USM1", 1, len(garbage), 0) + garbage + bytes(16)
    with pytest.raises(PeerError):
        read_public(garbage)


def public_of(data: bytes) -> dict[str, Any]:
    (public_bytes,) = struct.unpack_from("<I", data, 8)
    tree = Document.decode(data[16 : 16 + public_bytes], "public", bytes_max=1 << 20)
    return dict(tree._tree)


def with_public(tree: dict[str, Any]) -> bytes:
    public = encode(tree)
    return struct.pack("<4sB3xII", b"USM1", 1, len(public), 0) + public + bytes(16)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("machine", ["", str(uuid.uuid4()).upper(), uuid.uuid4().hex, 5]),
        ("generation", [0, -1, 1 << 32, "1"]),
        ("number", [0, 1 << 63, 1.5]),
        ("since", [1_000_000_007, 1 << 62, -1]),
        ("attempt", ["00" * 15, "00" * 17, "zz" * 16]),
        ("consistency", ["", "CRASH", "app "]),
        ("captured_ns", [1_700_000_000_000_000_001]),
        ("initial", [0, "true"]),
        ("disks", [[], {}, [{"disk": 64, "name": "", "size_bytes": 512}],
                   [{"disk": 0, "name": "", "size_bytes": 513}],
                   [{"disk": 0, "name": "", "size_bytes": 0}],
                   [{"disk": 0, "name": "", "size_bytes": (1 << 48) + 512}],
                   [{"disk": n, "name": "", "size_bytes": 512} for n in (1, 0)],
                   [{"disk": n, "name": "", "size_bytes": 512} for n in (1, 1)]]),
        ("segments", [[{"frames": 0, "size_bytes": 1, "digest": "00" * 16}],
                      [{"frames": 1, "size_bytes": 0, "digest": "00" * 16}],
                      [{"frames": 1, "size_bytes": (32 << 20) + 1, "digest": "00" * 16}],
                      [{"frames": 1, "size_bytes": 1, "digest": "00"}]]),
    ],
)  # fmt: skip
def test_senseless_fields_are_refused(key: str, values: list[Any]) -> None:
    sealer = new_sealer()
    tree = public_of(sample_manifest(sealer).seal(sealer))
    assert read_public(with_public(tree | {"later": 1})).machine == sealer.machine
    for value in values:
        with pytest.raises(PeerError):
            read_public(with_public(tree | {key: value}))
    del tree[key]
    with pytest.raises(PeerError, match=key):
        read_public(with_public(tree))


@pytest.mark.parametrize(
    "fields",
    [
        {"since": 1_000_000_007},
        {"captured_ns": 1_700_000_000_000_000_001},
        {"disks": ()},
        {"disks": (DiskShape(0, "x" * 256, 512),)},
        {"segments": (SegmentEntry(1, 0, bytes(16)),)},
        {"audit": (AuditDigest(64, 0, bytes(16)),)},
    ],
)
def test_manifest_that_nobody_could_read_is_not_sealed(fields: dict[str, Any]) -> None:
    sealer = new_sealer()
    made = replace(sample_manifest(sealer), **fields)
    with pytest.raises(PeerError):
        made.seal(sealer)
    sample_manifest(sealer).seal(sealer)
