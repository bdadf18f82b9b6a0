import struct
import threading
import tracemalloc
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import xxhash
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from replication import envelope
from replication.bookmark import Stamp
from replication.envelope import AttemptKey, AttemptSealer, new_attempt
from replication.errors import ConfigError, IntegrityError, PeerError
from replication.extent import Extent
from replication.frame import Codec, Frame, FrameHeader, FrameReader
from tests.replication.samples import (
    DATA_KEY,
    MACHINE,
    STAMP,
    data_of,
    extent_lists,
    new_sealer,
    quick,
    sample_manifest,
    seal_sample,
    stamps,
)


def read_one(whole: bytes) -> Frame:
    reader = FrameReader()
    reader.receive_data(whole)
    event = reader.next_event()
    assert isinstance(event, Frame)
    reader.close()
    return event


@quick
@given(extent_lists(), st.integers(0, 9), stamps, st.uuids(), st.integers(0, 63))
def test_what_is_sealed_opens(
    extents: tuple[Extent, ...], seed: int, stamp: Stamp, machine: uuid.UUID, disk: int
) -> None:
    sealer = AttemptSealer(DATA_KEY, machine, stamp)
    data = data_of(extents, seed)
    frame = read_one(sealer.seal_frame(sealer.next_number(), disk, extents, memoryview(data)))
    key = AttemptKey(DATA_KEY, machine, stamp, sealer.attempt)
    assert key.open_frame(frame) == data
    assert (frame.header.extents, frame.header.disk) == (extents, disk)
    assert frame.header.codec == (Codec.RAW if seed % 2 or not data else Codec.ZSTD)


def test_frame_of_another_key_machine_changeset_or_attempt_is_refused() -> None:
    sealer = new_sealer()
    frame = read_one(seal_sample(sealer))
    other_machine = uuid.UUID(int=MACHINE.int ^ 1)
    for key in (
        AttemptKey(bytes(32), MACHINE, STAMP, sealer.attempt),
        AttemptKey(DATA_KEY, other_machine, STAMP, sealer.attempt),
        AttemptKey(DATA_KEY, MACHINE, Stamp(STAMP.generation + 1, STAMP.number), sealer.attempt),
        AttemptKey(DATA_KEY, MACHINE, Stamp(STAMP.generation, STAMP.number + 1), sealer.attempt),
        AttemptKey(DATA_KEY, MACHINE, STAMP, new_attempt()),
    ):
        with pytest.raises(IntegrityError):
            key.open_frame(frame)


def test_payloads_of_two_frames_cannot_change_places() -> None:
    sealer = new_sealer()
    one, other = (read_one(seal_sample(sealer, random_data=True)) for _ in range(2))
    with pytest.raises(IntegrityError, match="altered"):
        sealer.open_frame(Frame(one.header, one.associated, other.sealed))


def test_frame_is_no_manifest() -> None:
    sealer = new_sealer()
    frame = read_one(seal_sample(sealer))
    with pytest.raises(IntegrityError, match="altered"):
        sealer.open_manifest(frame.associated, frame.sealed)


def test_data_key_of_another_length_is_refused() -> None:
    for size in (0, 16, 31, 33):
        with pytest.raises(ConfigError, match="32"):
            AttemptKey(bytes(size), MACHINE, STAMP, new_attempt())


# Frames that a holder of the key has sealed and that lie about what they unpack to.


def sealed_by_hand(packed: bytes, plain_bytes: int, *, digest: bytes | None = None) -> Frame:
    """A zstd frame, authentic under the key, with any payload."""
    attempt = bytes(16)
    header = FrameHeader(
        machine=MACHINE,
        stamp=STAMP,
        attempt=attempt,
        number=0,
        disk=0,
        codec=Codec.ZSTD,
        extents=(Extent(0, plain_bytes // 4096, zero=not plain_bytes),)
        if plain_bytes
        else (Extent(0, 1, zero=True),),
        plain_bytes=plain_bytes,
        sealed_bytes=16 + len(packed),
    )
    info = struct.pack("<21s16sIQ", b"understudy attempt v1", MACHINE.bytes, *_stamp(STAMP))
    subkey = HKDF(SHA256(), length=32, salt=attempt, info=info).derive(DATA_KEY)
    digest = xxhash.xxh3_128_digest(bytes(plain_bytes)) if digest is None else digest
    sealed = AESGCM(subkey).encrypt(b"\x01" + bytes(11), digest + packed, header.to_bytes())
    return read_one(header.to_bytes() + sealed)


def _stamp(stamp: Stamp) -> tuple[int, int]:
    return stamp.generation, stamp.number


def open_bounded(frame: Frame, bytes_max: int) -> bytes:
    """Open a frame and check that it took at most ``bytes_max`` to do so."""
    key = AttemptKey(DATA_KEY, MACHINE, STAMP, bytes(16))
    tracemalloc.start()
    try:
        return key.open_frame(frame)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < bytes_max, f"opening took {peak} bytes"


BOMB_BYTES = 64 << 20


def test_honest_frame_made_by_hand_opens() -> None:
    packed = zstandard.ZstdCompressor().compress(bytes(4096))
    assert open_bounded(sealed_by_hand(packed, 4096), 1 << 20) == bytes(4096)


def test_payload_that_declares_more_than_the_header_is_refused_unpacked() -> None:
    packed = zstandard.ZstdCompressor().compress(bytes(BOMB_BYTES))
    assert len(packed) < 8192
    with pytest.raises((PeerError, IntegrityError)):
        open_bounded(sealed_by_hand(packed, 8192), 1 << 20)


def test_payload_that_declares_no_size_is_refused_unpacked() -> None:
    packed = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(BOMB_BYTES))
    with pytest.raises((PeerError, IntegrityError)):
        open_bounded(sealed_by_hand(packed, 8192), 1 << 20)


def test_payload_that_unpacks_to_more_than_it_declares_stops_there() -> None:
    packed = bytearray(zstandard.ZstdCompressor().compress(bytes(BOMB_BYTES)))
    size_at = packed.index(BOMB_BYTES.to_bytes(4, "little"))
    packed[size_at : size_at + 4] = (8192).to_bytes(4, "little")
    assert zstandard.frame_content_size(bytes(packed)) == 8192
    with pytest.raises(IntegrityError):
        open_bounded(sealed_by_hand(bytes(packed), 8192), 1 << 20)


def test_payload_that_declares_exabytes_is_refused() -> None:
    packed = b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + bytes(40)
    with pytest.raises((PeerError, IntegrityError)):
        open_bounded(sealed_by_hand(packed, 4096), 1 << 20)


def test_window_larger_than_a_frame_is_refused() -> None:
    # Not a single segment, a window of 128 MiB, a content of 4096 bytes in 2 bytes, one raw block.
    content = bytes(range(256)) * 16
    packed = b"\x28\xb5\x2f\xfd\x40" + bytes([17 << 3]) + (4096 - 256).to_bytes(2, "little")
    packed += (4096 << 3 | 1).to_bytes(3, "little") + content
    assert zstandard.frame_content_size(packed) == 4096
    assert zstandard.get_frame_parameters(packed).window_size == 128 << 20
    frame = sealed_by_hand(packed, 8192, digest=xxhash.xxh3_128_digest(content))
    with pytest.raises((PeerError, IntegrityError)):
        open_bounded(frame, 1 << 20)


@pytest.mark.parametrize("tail", [b"more", zstandard.ZstdCompressor().compress(bytes(4096))])
def test_bytes_behind_the_payload_are_refused(tail: bytes) -> None:
    packed = zstandard.ZstdCompressor().compress(bytes(4096)) + tail
    with pytest.raises(IntegrityError):
        open_bounded(sealed_by_hand(packed, 4096), 1 << 20)


@quick
@given(st.binary(max_size=100))
def test_authentic_garbage_is_refused(packed: bytes) -> None:
    frame = sealed_by_hand(packed, 4096)
    key = AttemptKey(DATA_KEY, MACHINE, STAMP, bytes(16))
    with pytest.raises((PeerError, IntegrityError)):
        key.open_frame(frame)


def test_wrong_digest_inside_the_seal_is_refused() -> None:
    packed = zstandard.ZstdCompressor().compress(bytes(4096))
    with pytest.raises(IntegrityError, match="does not unpack to what was packed"):
        open_bounded(sealed_by_hand(packed, 4096, digest=bytes(16)), 1 << 20)


# No pair of key and nonce is used twice.


class Recorder:
    """Stands before AES-GCM and keeps every pair of key and nonce that seals something."""

    def __init__(self) -> None:
        self.pairs: list[tuple[bytes, bytes]] = []
        recorder = self

        class Recorded:
            def __init__(self, key: bytes) -> None:
                self._key, self._real = key, AESGCM(key)

            def encrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
                recorder.pairs.append((self._key, nonce))
                return self._real.encrypt(nonce, data, associated)

            def decrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
                return self._real.decrypt(nonce, data, associated)

        self.aead = Recorded


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(envelope, "AESGCM", recorder.aead)
    yield recorder
    assert recorder.pairs
    assert len(set(recorder.pairs)) == len(recorder.pairs), "a nonce was used twice under a key"


def test_no_nonce_twice_over_threads_changesets_and_restarts(recorder: Recorder) -> None:
    for restart in range(5):
        for number in (1, 2):
            sealer = new_sealer(Stamp(1, number))
            with ThreadPoolExecutor(4) as pool:
                frames = list(pool.map(lambda _, s=sealer: seal_sample(s), range(25)))
            found = sorted(read_one(frame).header.number for frame in frames)
            assert found == list(range(25))
            if restart % 2 == 0:  # a process that dies before its manifest does not reach this
                sample_manifest(sealer).seal(sealer)
    assert len(recorder.pairs) == 5 * 2 * 25 + 3 * 2


def test_manifest_and_frame_0_have_different_nonces(recorder: Recorder) -> None:
    sealer = new_sealer()
    seal_sample(sealer)
    sample_manifest(sealer).seal(sealer)
    assert len({nonce for _, nonce in recorder.pairs}) == 2
    assert len({key for key, _ in recorder.pairs}) == 1


def test_frame_number_seals_one_frame(recorder: Recorder) -> None:
    sealer = new_sealer()
    number = sealer.next_number()
    extents, data = [Extent(0, 1)], bytes(4096)
    sealer.seal_frame(number, 0, extents, data)
    for used in (number, number + 1):
        with pytest.raises(AssertionError):
            sealer.seal_frame(used, 0, extents, data)


def test_number_of_a_frame_that_failed_is_used_up(recorder: Recorder) -> None:
    sealer = new_sealer()
    number = sealer.next_number()
    with pytest.raises(struct.error):
        sealer.seal_frame(number, 1 << 20, [Extent(0, 1)], bytes(4096))
    with pytest.raises(AssertionError):
        sealer.seal_frame(number, 0, [Extent(0, 1)], bytes(4096))
    seal_sample(sealer)


def test_manifest_is_sealed_once(recorder: Recorder) -> None:
    sealer = new_sealer()
    sample_manifest(sealer).seal(sealer)
    with pytest.raises(AssertionError):
        sample_manifest(sealer).seal(sealer)


def test_threads_that_race_for_one_number_seal_one_frame(recorder: Recorder) -> None:
    sealer = new_sealer()
    number, barrier, refused = sealer.next_number(), threading.Barrier(4), []

    def race() -> None:
        barrier.wait()
        try:
            sealer.seal_frame(number, 0, [Extent(0, 1)], bytes(4096))
        except AssertionError:
            refused.append(1)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3


def test_attempts_differ() -> None:
    assert len({new_attempt() for _ in range(1000)}) == 1000
