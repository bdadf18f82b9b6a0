"""What an applier tells everyone upstream about a machine: one small blob, often rewritten.

Written by the applier alone; read by the process server, which passes it on to the agent with
each response. It may be lost or be some seconds old: everyone who reads it treats it as "at least
this much has been applied", never as "no more than this".

Source: FORMAT.md §8.
"""

import uuid
from dataclasses import dataclass
from typing import Any

from replication.bookmark import NOTHING, Stamp, read_machine
from replication.document import Document, encode
from replication.frame import ATTEMPT_BYTES, DISK_COUNT_MAX

WATERMARK_BYTES_MAX = 1 << 20
REPAIR_RUNS_MAX = 4096
WANTED_COUNT_MAX = 1024
NO_ATTEMPT = bytes(ATTEMPT_BYTES)


@dataclass(frozen=True, slots=True)
class RepairRun:
    """Blocks of a disk that the source should send again."""

    disk: int
    block: int
    count: int


@dataclass(frozen=True, slots=True)
class Repair:
    """A request for blocks that are rotten or differ at the second site.

    request: counts requests of a machine, from 1; a manifest says which it has fulfilled. A later
             request includes what of the earlier ones is still open. 0: nothing is asked for.
    """

    request: int = 0
    runs: tuple[RepairRun, ...] = ()


@dataclass(frozen=True, slots=True)
class Watermark:
    """How far a machine is applied.

    applied:       newest changeset in the store, on stable storage.
    attempt:       the attempt that it came from.
    restorable_ns: time of the newest recovery point (source's clock), 0 for none.
    wanted:        names of blobs of changesets after ``applied`` that are missing or damaged in
                   the cache: the process server uploads them again, over what is there.
    lost:          why the stream cannot go on without a new generation; empty while it can.
    lost_generation: the generation that cannot go on; 0 while it can.
    """

    machine: uuid.UUID
    applied: Stamp = NOTHING
    attempt: bytes = NO_ATTEMPT
    restorable_ns: int = 0
    wanted: tuple[str, ...] = ()
    repair: Repair = Repair()
    lost: str = ""
    lost_generation: int = 0

    def to_tree(self) -> dict[str, Any]:
        """As a part of a larger document."""
        return {
            "machine": str(self.machine),
            "generation": self.applied.generation,
            "number": self.applied.number,
            "attempt": self.attempt.hex(),
            "restorable_ns": self.restorable_ns,
            "wanted": list(self.wanted),
            "repair": self.repair.request,
            "repair_runs": [
                {"disk": run.disk, "block": run.block, "count": run.count}
                for run in self.repair.runs
            ],
            "lost": self.lost,
            "lost_generation": self.lost_generation,
        }

    def to_bytes(self) -> bytes:
        return encode(self.to_tree())

    @classmethod
    def from_document(cls, tree: Document) -> "Watermark":
        return cls(
            machine=read_machine(tree.text("machine", 36), "watermark.machine"),
            applied=Stamp(tree.uint("generation", (1 << 32) - 1), tree.uint("number")),
            attempt=tree.hex("attempt", ATTEMPT_BYTES),
            restorable_ns=tree.uint("restorable_ns"),
            wanted=tuple(tree.texts("wanted", WANTED_COUNT_MAX)),
            repair=Repair(
                tree.uint("repair"),
                tuple(
                    RepairRun(
                        item.uint("disk", DISK_COUNT_MAX - 1),
                        item.uint("block"),
                        item.uint("count"),
                    )
                    for item in tree.documents("repair_runs", REPAIR_RUNS_MAX)
                ),
            ),
            lost=tree.text("lost"),
            lost_generation=tree.uint("lost_generation", (1 << 32) - 1),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Watermark":
        """Raise PeerError when ``data`` is no watermark."""
        return cls.from_document(Document.decode(data, "watermark", bytes_max=WATERMARK_BYTES_MAX))
