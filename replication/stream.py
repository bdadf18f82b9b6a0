"""The HTTP protocol between agent and process server: paths, headers and the state document.

Source: FORMAT.md §9.
"""

import uuid
from dataclasses import dataclass

from replication.bookmark import Stamp
from replication.document import Document, encode
from replication.frame import ATTEMPT_BYTES
from replication.watermark import WATERMARK_BYTES_MAX, Watermark

ATTEMPT_HEADER = "Understudy-Attempt"
DIGEST_HEADER = "Understudy-Digest"
STATE_BYTES_MAX = WATERMARK_BYTES_MAX + (64 << 10)


def changeset_path(machine: uuid.UUID, stamp: Stamp) -> str:
    return f"/v1/machines/{machine}/generations/{stamp.generation}/changesets/{stamp.number}"


def segment_path(machine: uuid.UUID, stamp: Stamp, segment: int) -> str:
    return f"{changeset_path(machine, stamp)}/segments/{segment}"


def commit_path(machine: uuid.UUID, stamp: Stamp) -> str:
    return f"{changeset_path(machine, stamp)}/commit"


def sums_path(machine: uuid.UUID, generation: int, disk: int, level: int, part: int) -> str:
    return f"/v1/machines/{machine}/generations/{generation}/sums/{disk}/{level}/{part}"


def state_path(machine: uuid.UUID) -> str:
    return f"/v1/machines/{machine}/state"


@dataclass(frozen=True, slots=True)
class StreamState:
    """What a process server holds of a machine's stream; the body of ``GET state`` and of a commit.

    committed:     newest changeset that it has acknowledged (or found in the cache); the next one
                   counts from it (``since``) or from an earlier one.
    attempt:       the attempt of ``committed``; zeros where none or not known.
    durable_ns:    time of the newest bookmark whose changeset is whole in the cache storage
                   account, source's clock; 0 for none.
    time_ns:       process server's clock, for the measurement of skew.
    watermark:     the applier's, as last read.
    """

    committed: Stamp
    attempt: bytes
    durable_ns: int
    time_ns: int
    watermark: Watermark

    def to_bytes(self) -> bytes:
        return encode(
            {
                "generation": self.committed.generation,
                "number": self.committed.number,
                "attempt": self.attempt.hex(),
                "durable_ns": self.durable_ns,
                "time_ns": self.time_ns,
                "watermark": self.watermark.to_tree(),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "StreamState":
        """Raise PeerError when ``data`` is no state document."""
        tree = Document.decode(data, "stream state", bytes_max=STATE_BYTES_MAX)
        return cls(
            committed=Stamp(tree.uint("generation", (1 << 32) - 1), tree.uint("number")),
            attempt=tree.hex("attempt", ATTEMPT_BYTES),
            durable_ns=tree.uint("durable_ns"),
            time_ns=tree.uint("time_ns"),
            watermark=Watermark.from_document(tree.document("watermark")),
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """The body of every response that is not a success."""

    code: str
    message: str
    hint: str = ""

    def to_bytes(self) -> bytes:
        return encode({"code": self.code, "message": self.message, "hint": self.hint})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Refusal":
        tree = Document.decode(data, "refusal", bytes_max=STATE_BYTES_MAX)
        return cls(tree.text("code"), tree.text("message"), tree.text("hint"))
