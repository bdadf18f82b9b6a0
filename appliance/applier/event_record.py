"""What happened to a machine's data, for whoever asks later: ``events.jsonl``, newest last.

One JSON object a line: ``time_ns``, ``code``, ``message``. A line that a power cut has torn is
passed over when the file is read again.
"""

import json
import os
from dataclasses import asdict, dataclass

from daemon.durable import storage_error, write_whole

EVENT_COUNT_MAX = 1000
EVENTS_FILE = "events.jsonl"
_MESSAGE_CHARS_MAX = 2000


@dataclass(frozen=True, slots=True)
class Event:
    """time_ns: the applier's clock, nanoseconds since 1970 UTC."""

    time_ns: int
    code: str
    message: str

    def to_line(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"


class EventRecord:
    """The newest EVENT_COUNT_MAX events of a machine; each is on stable storage when told."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, EVENTS_FILE)
        self._events, self._lines = _read(self._path)
        if self._lines != len(self._events):
            # What a torn line left must not grow together with the next one.
            write_whole(self._path, [event.to_line() for event in self._events])
            self._lines = len(self._events)

    @property
    def events(self) -> tuple[Event, ...]:
        """Oldest first."""
        return tuple(self._events)

    def tell(self, time_ns: int, code: str, message: str) -> None:
        event = Event(time_ns, code, message[:_MESSAGE_CHARS_MAX])
        self._events = [*self._events, event][-EVENT_COUNT_MAX:]
        if not self._lines or self._lines >= 2 * EVENT_COUNT_MAX:
            write_whole(self._path, [item.to_line() for item in self._events])
            self._lines = len(self._events)
            return
        try:
            with open(self._path, "ab") as file:
                file.write(event.to_line())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error("write", self._path, error) from error
        self._lines += 1


def _read(path: str) -> tuple[list[Event], int]:
    """The newest events, and how many lines there are; one more when the last one is torn."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise storage_error("read", path, error) from error
    lines = content.splitlines()
    events = []
    for line in lines[-EVENT_COUNT_MAX:]:
        try:
            tree = json.loads(line)
            events.append(Event(int(tree["time_ns"]), str(tree["code"]), str(tree["message"])))
        except (ValueError, KeyError, TypeError):
            continue
    is_torn = bool(content) and not content.endswith(b"\n")
    return events, len(lines) + is_torn
