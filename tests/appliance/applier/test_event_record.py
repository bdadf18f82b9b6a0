from pathlib import Path

from appliance.applier.event_record import EVENT_COUNT_MAX, EVENTS_FILE, Event, EventRecord


def test_events_are_there_after_a_restart(tmp_path: Path) -> None:
    EventRecord(str(tmp_path)).tell(7, "rotten", "block 5\nof disk 0")
    assert EventRecord(str(tmp_path)).events == (Event(7, "rotten", "block 5\nof disk 0"),)


def test_record_keeps_the_newest_and_stays_bounded(tmp_path: Path) -> None:
    record = EventRecord(str(tmp_path))
    for number in range(2 * EVENT_COUNT_MAX + 10):
        record.tell(number, "c", "m")
    lines = (tmp_path / EVENTS_FILE).read_bytes().splitlines()
    assert len(lines) <= 2 * EVENT_COUNT_MAX
    events = EventRecord(str(tmp_path)).events
    assert len(events) == EVENT_COUNT_MAX
    assert events[-1].time_ns == 2 * EVENT_COUNT_MAX + 9


def test_torn_line_is_passed_over(tmp_path: Path) -> None:
    EventRecord(str(tmp_path)).tell(1, "a", "first")
    with (tmp_path / EVENTS_FILE).open("ab") as file:
        file.write(b'{"time_ns":2,"co')
    record = EventRecord(str(tmp_path))
    record.tell(3, "b", "third")
    assert [event.time_ns for event in EventRecord(str(tmp_path)).events] == [1, 3]
