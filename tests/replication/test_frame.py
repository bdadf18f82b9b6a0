import random
import struct
import tracemalloc
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.bookmark import Stamp
from replication.envelope import AttemptKey
from replication.errors import IntegrityError, PeerError
from replication.extent import Extent
from replication.frame import (
    FRAME_BYTES_MAX,
    HEADER_BYTES,
    NEED_DATA,
    Codec,
    Frame,
    FrameHeader,
    FrameReader,
    read_header,
)
from tests.replication.samples import (
    DATA_KEY,
    extent_lists,
    new_sealer,
    quick,
    seal_sample,
    stamps,
)


def read_all(pieces: list[bytes]) -> list[Frame]:
    """All frames that the pieces make, asking after each piece."""
    reader, frames = FrameReader(), []
    for piece in pieces:
        reader.receive_data(piece)
        while isinstance(event := reader.next_event(), Frame):
            frames.append(event)
    reader.close()
    return frames


@st.composite
def headers(draw: st.DrawFn) -> FrameHeader:
    extents = draw(extent_lists())
    plain_bytes = sum(extent.data_bytes for extent in extents)
    codec = draw(st.sampled_from(Codec))
    sealed_least = 16 if codec == Codec.ZSTD else 16 + plain_bytes
    return FrameHeader(
        machine=draw(st.uuids()),
        stamp=draw(stamps),
        attempt=draw(st.binary(min_size=16, max_size=16)),
        number=draw(st.integers(0, (1 << 32) - 1)),
        disk=draw(st.integers(0, 63)),
        codec=codec,
        extents=extents,
        plain_bytes=plain_bytes,
        sealed_bytes=draw(st.integers(sealed_least, 16 + plain_bytes)),
    )


@quick
@given(headers())
def test_header_round_trips(header: FrameHeader) -> None:
    assert read_header(header.to_bytes()) == header


@quick
@given(st.lists(headers(), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_frames_arrive_whole_whatever_the_pieces(
    sent: list[FrameHeader], source: random.Random
) -> None:
    frames = []
    for header in sent:
        sealed = source.randbytes(header.sealed_bytes + 16)
        frames.append(Frame(header, header.to_bytes(), sealed))
    stream = b"".join(frame.associated + frame.sealed for frame in frames)
    assert read_all([stream]) == frames
    cuts = sorted(source.randrange(len(stream) + 1) for _ in range(12))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read_all(pieces) == frames


def test_frames_arrive_whole_byte_by_byte() -> None:
    sealer = new_sealer()
    stream = b"".join(seal_sample(sealer, blocks=blocks) for blocks in (0, 1, 3))
    frames = read_all([bytes([byte]) for byte in stream])
    assert [frame.header.number for frame in frames] == [0, 1, 2]
    assert b"".join(frame.associated + frame.sealed for frame in frames) == stream


def test_end_inside_a_frame_is_an_error_and_between_frames_is_not() -> None:
    whole = seal_sample(new_sealer())
    for size in range(len(whole)):
        reader = FrameReader()
        reader.receive_data(whole[:size])
        assert reader.next_event() is NEED_DATA
        if size:
            with pytest.raises(PeerError, match="ends"):
                reader.close()
        reader.receive_data(whole[size:] + whole[:3])
        assert isinstance(reader.next_event(), Frame)
        assert reader.next_event() is NEED_DATA


@pytest.mark.parametrize("random_data", [False, True])
def test_every_flipped_bit_is_refused_or_waits_for_more(random_data: bool) -> None:
    sealer = new_sealer()
    whole = seal_sample(sealer, random_data=random_data)
    key = AttemptKey(DATA_KEY, sealer.machine, sealer.stamp, sealer.attempt)
    # All bits of what is read first and of a short payload; one in 13 of a long one.
    bits = (
        range(len(whole) * 8)
        if len(whole) < 1000
        else (*range(200 * 8), *range(200 * 8, len(whole) * 8, 13))
    )
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        reader = FrameReader()
        reader.receive_data(flipped)
        try:
            event = reader.next_event()
            assert event is NEED_DATA or key.open_frame(event) is None
        except (PeerError, IntegrityError):
            continue
        assert 56 <= bit // 8 < 68, "only a length can make the reader wait"


HEADER = struct.Struct("<4sBBH16sIIQ16sIIII")
SOUND: dict[str, object] = {
    "magic": b"USF1", "version": 1, "codec": 0, "disk": 1, "machine": bytes(16), "generation": 1,
    "number": 0, "changeset": 1, "attempt": bytes(16), "extents": 1, "plain": 4096,
    "sealed": 4112, "reserved": 0,
}  # fmt: skip


def head(**fields: object) -> bytes:
    return HEADER.pack(*(SOUND | fields).values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"magic": b"USF2"},
        {"version": 2},
        {"extents": 0},
        {"extents": 1025},
        {"extents": (1 << 32) - 1},
        {"plain": 4095},
        {"plain": (1 << 20) + 4096},
        {"plain": 0xFFFFF000},
        {"sealed": 15},
        {"sealed": 4113},
        {"sealed": (1 << 32) - 1},
        {"reserved": 1},
    ],
)
def test_lengths_that_are_too_big_are_refused_before_they_are_waited_for(
    wrong: dict[str, object],
) -> None:
    reader = FrameReader()
    reader.receive_data(head(**wrong))
    with pytest.raises(PeerError):
        reader.next_event()
    with pytest.raises(PeerError, match="broken"):
        reader.next_event()


@pytest.mark.parametrize(
    "wrong",
    [
        {"codec": 2},
        {"codec": 255},
        {"disk": 64},
        {"generation": 0},
        {"changeset": 0},
        {"sealed": 100},
        {"plain": 8192, "sealed": 8208},
    ],
)
def test_senseless_headers_are_refused(wrong: dict[str, object]) -> None:
    table = struct.pack("<QII", 9, 1, 0)
    assert read_header(head() + table).disk == 1
    with pytest.raises(PeerError):
        read_header(head(**wrong) + table)


def test_magic_is_checked_from_the_first_byte() -> None:
    for start in (b"X", b"UX", b"USFX"):
        reader = FrameReader()
        reader.receive_data(start)
        with pytest.raises(PeerError, match="starts with"):
            reader.next_event()


@quick
@given(st.binary(max_size=400), st.booleans())
def test_garbage_is_refused_or_waits_for_more(garbage: bytes, with_magic: bool) -> None:
    reader = FrameReader()
    reader.receive_data((b"USF1\x01" if with_magic else b"") + garbage)
    try:
        while reader.next_event() is not NEED_DATA:
            pass
        reader.close()
    except PeerError:
        return
    assert not garbage
    assert not with_magic


def test_memory_is_bounded_by_one_frame_whatever_is_fed() -> None:
    """A peer that drips a frame of the greatest size, then another, holds no more than one."""
    sealer = new_sealer()
    noise = random.Random(4).randbytes(1 << 20)
    whole = sealer.seal_frame(sealer.next_number(), 0, [Extent(0, 256)], noise)
    assert len(whole) < FRAME_BYTES_MAX
    reader = FrameReader()
    tracemalloc.start()
    try:
        for _ in range(5):
            for offset in range(0, len(whole), 1 << 16):
                reader.receive_data(whole[offset : offset + (1 << 16)])
                reader.next_event()
        assert tracemalloc.get_traced_memory()[1] < 3 * FRAME_BYTES_MAX
    finally:
        tracemalloc.stop()


def test_header_that_is_cut_or_followed_by_more_is_refused() -> None:
    whole = head() + struct.pack("<QII", 9, 1, 0)
    for wrong in (whole[:-1], whole[:HEADER_BYTES], whole[:71], b"", whole + bytes(16)):
        with pytest.raises(PeerError):
            read_header(wrong)


def test_machine_bytes_are_in_the_order_of_the_uuid() -> None:
    machine = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
    header = FrameHeader(
        machine, Stamp(1, 1), bytes(16), 0, 0, Codec.RAW, (Extent(0, 1),), 4096, 4112
    )
    assert header.to_bytes()[8:24].hex() == machine.hex
