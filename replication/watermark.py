"""What an applier tells everyone upstream about a machine: one small blob, often rewritten.

Written by the applier alone; read by the process server, which passes it on to the agent with
each response. It may be lost or be some seconds old: everyone who reads it treats it as "at least
this much has been applied", never as "no more than this". The applier authenticates it under a
subkey of the data key; the process server, which has no key, passes it on as it is, and the agent
believes nothing that is not authentic.

Source: FORMAT.md §8.
"""

import hmac
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from replication.bookmark import NOTHING, Stamp, read_machine
from replication.document import Document, encode
from replication.envelope import DATA_KEY_BYTES
from replication.errors import ConfigError
from replication.frame import ATTEMPT_BYTES, DISK_COUNT_MAX
from replication.manifest import BASIS_BYTES, NO_BASIS

WATERMARK_BYTES_MAX = 1 << 20
REPAIR_RUNS_MAX = 4096
WANTED_COUNT_MAX = 1024
NO_ATTEMPT = bytes(ATTEMPT_BYTES)
MAC_BYTES = 32
NO_MAC = b""
_LABEL = b"understudy watermark v1"
_MAC_KEY = "mac"


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
    lost:          why the stream cannot go on without a resync; empty while it can.
    lost_generation: the generation that cannot go on; 0 while it can.
    lost_cause:    what kind of loss it is, a ``ResyncCause``; empty while it can go on.
    sums:          the basis whose sums, of the state at ``applied``, are in the cache; NO_BASIS
                   while there are none.
    mac:           authenticates all the rest; NO_MAC where it was left out.
    received:      the document as it came, for whoever passes it on: a newer applier may say more
                   than is known here, and all of it is authenticated.
    """

    machine: uuid.UUID
    applied: Stamp = NOTHING
    attempt: bytes = NO_ATTEMPT
    restorable_ns: int = 0
    wanted: tuple[str, ...] = ()
    repair: Repair = Repair()
    lost: str = ""
    lost_generation: int = 0
    lost_cause: str = ""
    sums: bytes = NO_BASIS
    mac: bytes = NO_MAC
    received: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def is_blank(self) -> bool:
        """Whether it says nothing at all: no applier has written one yet."""
        return self == Watermark(self.machine)

    def signed(self, key: "WatermarkKey") -> "Watermark":
        """The same, authenticated."""
        bare = replace(self, mac=NO_MAC, received=None)
        return replace(bare, mac=key.mac(bare.to_tree()))

    def is_authentic(self, key: "WatermarkKey") -> bool:
        """Whether the applier that has the data key wrote exactly this."""
        return hmac.compare_digest(key.mac(self.to_tree()), self.mac)

    def to_tree(self) -> dict[str, Any]:
        """As a part of a larger document."""
        if self.received is not None:
            return dict(self.received)
        tree = {
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
            "lost_cause": self.lost_cause,
            "sums": self.sums.hex(),
        }
        return tree | {_MAC_KEY: self.mac.hex()} if self.mac else tree

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
            lost_cause=tree.text("lost_cause", 64) if "lost_cause" in tree else "",
            sums=tree.hex("sums", BASIS_BYTES) if "sums" in tree else NO_BASIS,
            mac=tree.hex(_MAC_KEY, MAC_BYTES) if _MAC_KEY in tree else NO_MAC,
            received=dict(tree.tree),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Watermark":
        """Raise PeerError when ``data`` is no watermark."""
        return cls.from_document(Document.decode(data, "watermark", bytes_max=WATERMARK_BYTES_MAX))


class WatermarkKey:
    """Authenticates one machine's watermarks."""

    def __init__(self, data_key: bytes, machine: uuid.UUID) -> None:
        if len(data_key) != DATA_KEY_BYTES:
            raise ConfigError(f"a data key has {len(data_key)} bytes, not {DATA_KEY_BYTES}")
        self.machine = machine
        info = _LABEL + machine.bytes
        self._key = HKDF(SHA256(), length=32, salt=None, info=info).derive(data_key)

    def mac(self, tree: dict[str, Any]) -> bytes:
        """HMAC-SHA256 over the whole document in its canonical form, but for the code itself."""
        rest = {name: value for name, value in tree.items() if name != _MAC_KEY}
        return hmac.digest(self._key, encode(rest), "sha256")
