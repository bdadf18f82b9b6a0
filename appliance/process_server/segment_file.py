"""A segment while it comes in: written to a file of its own and checked frame by frame.

Only what is whole and checked gets its name in the spool; until then a crash leaves a file in the
incoming folder, which the next start empties. Holds at most one frame in memory. Methods block:
call them in a thread, one at a time.
"""

import contextlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from daemon.durable import storage_error
from replication.bookmark import Stamp
from replication.errors import PeerError
from replication.frame import Frame, FrameReader


@dataclass(frozen=True, slots=True)
class AttemptId:
    """Which attempt at which changeset of which machine."""

    machine: uuid.UUID
    stamp: Stamp
    attempt: bytes

    def __str__(self) -> str:
        return f"attempt {self.attempt.hex()} at changeset {self.stamp} of {self.machine}"


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment in the spool; its file's name tells all of this but the size.

    first_frame: number of its first frame; the others follow without a gap.
    """

    index: int
    digest: bytes
    first_frame: int
    frame_count: int
    size_bytes: int

    @property
    def file_name(self) -> str:
        return f"{self.index:06}.{self.digest.hex()}.{self.first_frame}.{self.frame_count}"

    @classmethod
    def from_file_name(cls, name: str, size_bytes: int) -> "Segment | None":
        """None for a name that is no segment's."""
        try:
            index, digest, first_frame, frame_count = name.split(".")
            found = cls(
                int(index), bytes.fromhex(digest), int(first_frame), int(frame_count), size_bytes
            )
        except ValueError:
            return None
        return found if found.file_name == name else None


class SegmentFile:
    """A segment of ``expected`` that is coming in, in a new file at ``path``."""

    def __init__(self, path: str, expected: AttemptId) -> None:
        self.path = path
        self._expected = expected
        self._reader = FrameReader()
        self._hasher = xxhash.xxh3_128()
        self._first_frame: int | None = None
        self._frame_count = 0
        self._size_bytes = 0
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error("create", path, error) from error

    def write(self, pieces: Sequence[bytes]) -> None:
        """Raise PeerError for what is no frame of this attempt, StorageError on a full disk."""
        for piece in pieces:
            self._hasher.update(piece)
            self._reader.receive_data(piece)
            while isinstance(frame := self._reader.next_event(), Frame):
                self._check(frame)
        self._write_all(pieces)

    def finish(self, index: int) -> Segment:
        """Make the bytes durable (the name is not) and return what has come.

        Raises PeerError when the bytes end inside a frame.
        """
        self._reader.close()
        if self._first_frame is None:
            raise PeerError("a segment holds at least one frame")
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise storage_error("write", self.path, error) from error
        return Segment(
            index, self._hasher.digest(), self._first_frame, self._frame_count, self._size_bytes
        )

    def discard(self) -> None:
        """Close the file and remove it if it has not got its place. Fine to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def _check(self, frame: Frame) -> None:
        header = frame.header
        found = AttemptId(header.machine, header.stamp, header.attempt)
        if found != self._expected:
            raise PeerError(f"a frame is of {found}, where {self._expected} was expected")
        if self._first_frame is None:
            self._first_frame = header.number
        follows = self._first_frame + self._frame_count
        if header.number != follows:
            raise PeerError(f"frame {header.number} comes where {follows} was expected")
        self._frame_count += 1

    def _write_all(self, pieces: Sequence[bytes]) -> None:
        views = [memoryview(piece) for piece in pieces]
        try:
            while views:
                written = os.writev(self._fd, views)
                self._size_bytes += written
                while views and written >= len(views[0]):
                    written -= len(views.pop(0))
                if written:
                    views[0] = views[0][written:]
        except OSError as error:
            raise storage_error("write", self.path, error) from error
