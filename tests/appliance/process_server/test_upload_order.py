"""Which segment goes into the cache next."""

import uuid
from pathlib import Path

import pytest

from appliance.process_server.changeset import Changeset, OpenAttempt
from appliance.process_server.disk_threads import DiskThreads
from appliance.process_server.order import Position
from appliance.process_server.room import Room
from appliance.process_server.segment_file import AttemptId, Segment
from appliance.process_server.spool import Spool
from appliance.process_server.stream import Stream
from appliance.process_server.upload_order import CHANGESETS_AHEAD_MAX, UploadOrder
from replication.bookmark import Stamp

MACHINE = uuid.uuid4()
SIZE = 10


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    return Stream(MACHINE, Spool(str(tmp_path / "spool")), Room(1 << 30), DiskThreads())


def attempt_id(number: int, attempt: int = 0) -> AttemptId:
    return AttemptId(MACHINE, Stamp(1, number), bytes([attempt]) * 16)


def segments(count: int) -> list[Segment]:
    return [Segment(index, bytes(16), index, 1, SIZE) for index in range(count)]


def hold(stream: Stream, number: int, count: int = 2) -> Changeset:
    held = Changeset(attempt_id(number), tuple(segments(count)), number - 1, 1, 1, bytes(16))
    stream.held[held.stamp] = held
    return held


def begin(stream: Stream, number: int, count: int, *, attempt: int = 1) -> OpenAttempt:
    opened = OpenAttempt(attempt_id(number, attempt), number * 100 + attempt)
    opened.segments = {segment.index: segment for segment in segments(count)}
    stream.attempts[(opened.id.stamp, opened.id.attempt)] = opened
    return opened


def taken(order: UploadOrder, stream: Stream) -> list[tuple[int, int]]:
    """Number and index of all that is given out."""
    found = []
    while (due := order.take(stream)) is not None:
        found.append((due.of.id.stamp.number, due.segment.index))
    return found


def test_oldest_first_each_once_and_what_is_coming_last(stream: Stream) -> None:
    begin(stream, 3, 2)
    hold(stream, 2)
    hold(stream, 1)
    order = UploadOrder(ahead_bytes_min=1)
    assert taken(order, stream) == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert order.take(stream) is None


def test_what_went_ahead_is_not_given_out_again_after_its_commit(stream: Stream) -> None:
    opened = begin(stream, 1, 2)
    order = UploadOrder(ahead_bytes_min=1)
    assert len(taken(order, stream)) == 2
    stream.attempts.clear()
    hold(stream, 1, 3).uploads = opened.uploads
    assert taken(order, stream) == [(1, 2)]


def test_what_is_whole_or_uploaded_is_left_alone(stream: Stream) -> None:
    hold(stream, 1).whole = True
    hold(stream, 2).uploads.begun = {0}
    assert taken(UploadOrder(), stream) == [(2, 1)]


def test_no_more_changesets_than_the_window_has_room_for(stream: Stream) -> None:
    for number in range(1, CHANGESETS_AHEAD_MAX + 3):
        hold(stream, number, 1)
    begin(stream, 20, 1)
    order = UploadOrder(ahead_bytes_min=1)
    numbers = [number for number, _ in taken(order, stream)]
    assert numbers == list(range(1, CHANGESETS_AHEAD_MAX + 1))
    for number in (1, 2, 3):
        stream.held[Stamp(1, number)].whole = True
    assert [number for number, _ in taken(order, stream)] == [
        CHANGESETS_AHEAD_MAX + 1,
        CHANGESETS_AHEAD_MAX + 2,
        20,
    ]


def test_a_small_changeset_waits_for_its_commit(stream: Stream) -> None:
    begin(stream, 1, 2)
    assert taken(UploadOrder(ahead_bytes_min=2 * SIZE + 1), stream) == []
    assert len(taken(UploadOrder(ahead_bytes_min=2 * SIZE), stream)) == 2


def test_only_so_much_goes_ahead_until_the_next_commit(stream: Stream) -> None:
    order = UploadOrder(ahead_bytes_min=1, ahead_bytes_max=3 * SIZE)
    begin(stream, 1, 2, attempt=1)
    assert len(taken(order, stream)) == 2
    stream.attempts.clear()
    begin(stream, 1, 2, attempt=2)
    assert len(taken(order, stream)) == 1, "an agent that begins again and again fills the cache"
    stream.attempts.clear()
    stream.position = Position(Stamp(1, 1))
    begin(stream, 2, 4)
    assert len(taken(order, stream)) == 3
