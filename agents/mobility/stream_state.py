"""What the agent must still know after a crash, on stable storage.

One file, replaced whole at each step, so that its parts never disagree:

- ``todo``: per disk, the blocks that are known to have changed and that no acknowledged changeset
  holds. Bits move here from the tracker before the tracker forgets them.
- the position: generation, the last number acknowledged, the number since which ``todo`` counts.
- the pending commit: number and attempt of a changeset whose commit was sent. After a crash the
  process server's answer tells whether it was taken.

Beside it, a file for each changeset that was committed and is not yet applied: the blocks that it
held. Should the process server lose it, those blocks go back into ``todo``. They are small, and
as many as the process server has changesets in its spool.

Invariant, at every instant and across SIGKILL: a block that changed after the newest applied
changeset is in the tracker, in ``todo``, or in the file of a changeset that is not yet applied; or
a resync is required, or is comparing, which finds it (``Resync``).
"""

import os
import struct
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import xxhash

from agents.mobility.device import DeviceIdentity
from agents.mobility.resync_stage import Resync, Stage
from daemon.durable import make_folder, storage_error, write_whole
from replication.block_set import BLOCK_BYTES, BlockSet
from replication.bookmark import NOTHING, Stamp
from replication.document import Document, encode
from replication.errors import IntegrityError, ReplicationError
from replication.frame import ATTEMPT_BYTES, DISK_COUNT_MAX
from replication.manifest import BASIS_BYTES, NO_BASIS
from replication.watermark import NO_ATTEMPT

BlockSets = dict[int, BlockSet]
"""Disk index to blocks."""

_HEADER = struct.Struct("<4sB3xI16s")
_DIGEST_BYTES = 16
_MAGIC = b"USS1"
_SETS_MAGIC = b"USR1"
_VERSION = 1
_BEGIN_ANEW = "remove {path}: the disks are then compared with the second site, and replicated anew"
_JSON_BYTES_MAX = 1 << 20
_SET_LENGTH = struct.Struct("<HxxxxxxQ")


def size_of(sets: BlockSets) -> int:
    """Bytes that the blocks of all disks hold."""
    return sum(len(blocks) for blocks in sets.values()) * BLOCK_BYTES


def merge(into: BlockSets, sets: Mapping[int, BlockSet]) -> None:
    """Add ``sets`` to ``into``, which knows all their disks: nothing may be dropped on the way."""
    for disk, blocks in sets.items():
        assert disk in into, f"disk {disk} is not among those of the generation"
        into[disk] |= blocks


def subtract(from_sets: BlockSets, sets: Mapping[int, BlockSet]) -> None:
    for disk, blocks in sets.items():
        if disk in from_sets and from_sets[disk].block_count == blocks.block_count:
            from_sets[disk] -= blocks


@dataclass(frozen=True, slots=True)
class Pending:
    """A commit that was sent and not yet known to be taken.

    whole: the changeset holds all of ``todo``, so it is not a part of an initial replication or
           of a backlog that is cut into several.
    """

    stamp: Stamp
    attempt: bytes
    whole: bool


@dataclass(frozen=True, slots=True)
class Position:
    """Where the stream stands.

    generation:  of the stream; 0 before the first.
    committed:   last number acknowledged by the process server.
    used:        highest number whose commit may have been sent, acknowledged or not: no other
                 changeset ever gets it, for the first one may yet arrive.
    used_attempt: the attempt that it was sent with.
    attempt:     the attempt that was acknowledged.
    since:       the number that ``todo`` counts from.
    applied:     newest changeset known to be in the store.
    repaired:    newest repair request that an acknowledged changeset has fulfilled.
    repairing:   newest repair request whose blocks are in ``todo``.
    seeded:      whether the initial replication of the generation is complete.
    audit_chunk: where the audit goes on, counting chunks over all disks.
    identities:  the disks as they were when tracking last went on without interruption.
    basis:       names the state at the second site that the generation counts from; NO_BASIS where
                 it began with all blocks.
    origin:      names this stream of a generation that began with all blocks, which another one may
                 begin by the same number when nobody remembers this one; NO_BASIS elsewhere.
    resync:      required or under way; None while all goes well.
    resync_request: newest order to resync that was taken up.
    """

    generation: int = 0
    committed: int = 0
    used: int = 0
    used_attempt: bytes = NO_ATTEMPT
    attempt: bytes = NO_ATTEMPT
    since: int = 0
    applied: Stamp = NOTHING
    repaired: int = 0
    repairing: int = 0
    seeded: bool = False
    audit_chunk: int = 0
    pending: Pending | None = None
    identities: Mapping[int, DeviceIdentity] = field(default_factory=dict)
    basis: bytes = NO_BASIS
    origin: bytes = NO_BASIS
    resync: Resync | None = None
    resync_request: int = 0

    @property
    def next_stamp(self) -> Stamp:
        """Of the next changeset."""
        return Stamp(self.generation, max(self.committed, self.used) + 1)

    @property
    def stage(self) -> Stage | None:
        """Of the resync; None where there is none."""
        return self.resync.stage if self.resync is not None else None


@dataclass(frozen=True, slots=True)
class _Retained:
    """A file of blocks: of changeset ``number``, which counts from ``since``."""

    number: int
    since: int


class StreamStateFile:
    """The agent's folder of state; one process at a time."""

    def __init__(self, folder: str, machine: uuid.UUID) -> None:
        self._folder = os.path.join(folder, str(machine))
        self._path = os.path.join(self._folder, "stream.state")
        self._retained_folder = os.path.join(self._folder, "retained")
        self.position = Position()
        self.todo: BlockSets = {}
        make_folder(self._retained_folder)
        self._load()
        self.drop_strays()

    @property
    def folder(self) -> str:
        return self._folder

    def save(self, todo: BlockSets | None = None, **changes: object) -> None:
        """Replace the file by ``todo`` and the position with ``changes``; durable on return.

        todo: replaces the one in memory too, once it is durable. A failed write changes neither.
        """
        todo = self.todo if todo is None else todo
        position = replace(self.position, **changes)  # type: ignore[arg-type]
        write_whole(self._path, _pack(position, todo))
        self.position, self.todo = position, todo

    def retain(self, number: int, since: int, sets: BlockSets) -> None:
        """Keep what a changeset holds until it is known to be applied; durable on return.

        What an attempt that was given up had left under the number goes first, so that a number
        names one set.
        """
        self.forget([number])
        name = f"{self.position.generation:08}-{number:012}-{since:012}.sets"
        write_whole(
            os.path.join(self._retained_folder, name), _sealed(_SETS_MAGIC, b"", _pack_sets(sets))
        )

    def retained(self) -> dict[int, int]:
        """The changesets of this generation that are kept: number to the number it counts from."""
        return {entry.number: entry.since for entry in self._entries().values()}

    def read_retained(self, number: int) -> BlockSets:
        """The blocks of a changeset that is kept, a number of ``retained``."""
        for name, entry in self._entries().items():
            if entry.number == number:
                return self._read_sets(os.path.join(self._retained_folder, name))
        raise self._anew(f"the block set of changeset {number} is gone from {self._folder}")

    def _read_sets(self, path: str) -> BlockSets:
        try:
            with open(path, "rb") as file:
                data = file.read()
            return _unpack_sets(_unsealed(_SETS_MAGIC, data)[1])
        except OSError as error:
            raise storage_error("read", path, error) from error
        except ReplicationError as error:
            raise self._anew(f"the block set {path} is damaged: {error}") from error

    def _anew(self, message: str) -> IntegrityError:
        return IntegrityError(message, hint=_BEGIN_ANEW.format(path=self._path))

    def forget(self, numbers: Collection[int]) -> None:
        """Drop what is kept of changesets; not durable by itself, and needs not be."""
        for name, entry in self._entries().items():
            if entry.number in numbers:
                self._unlink(os.path.join(self._retained_folder, name))

    def drop_retained(self) -> None:
        """Remove all block sets: a generation begins, and they are of earlier ones."""
        for name in self._listed():
            self._unlink(os.path.join(self._retained_folder, name))

    def drop_strays(self) -> None:
        """Remove what interrupted writes and earlier generations left behind."""
        known = self._entries()
        for name in self._listed():
            if name not in known:
                self._unlink(os.path.join(self._retained_folder, name))
        prefix = f"{os.path.basename(self._path)}."
        for name in os.listdir(self._folder):
            if name.startswith(prefix) and name.endswith(".new"):
                self._unlink(os.path.join(self._folder, name))

    def _unlink(self, path: str) -> None:
        try:
            os.unlink(path)
        except OSError as error:
            raise storage_error("delete", path, error) from error

    def _listed(self) -> list[str]:
        try:
            return os.listdir(self._retained_folder)
        except OSError as error:
            raise storage_error("list", self._retained_folder, error) from error

    def _entries(self) -> dict[str, _Retained]:
        found = {}
        for name in self._listed():
            pieces = name.removesuffix(".sets").split("-")
            if not name.endswith(".sets") or len(pieces) != 3:
                continue
            if all(piece.isdecimal() for piece in pieces):
                generation, number, since = map(int, pieces)
                if generation == self.position.generation:
                    found[name] = _Retained(number, since)
        return found

    def _load(self) -> None:
        try:
            with open(self._path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise storage_error("read", self._path, error) from error
        try:
            self.position, self.todo = _unpack(data)
        except ReplicationError as error:
            raise self._anew(f"the agent's state {self._path} is damaged: {error}") from error


def _pack_sets(sets: BlockSets) -> bytes:
    parts = []
    for disk, blocks in sorted(sets.items()):
        packed = blocks.to_bytes()
        parts += [_SET_LENGTH.pack(disk, len(packed)), packed]
    return b"".join(parts)


def _unpack_sets(data: bytes) -> BlockSets:
    sets: BlockSets = {}
    offset = 0
    while offset < len(data):
        if len(data) - offset < _SET_LENGTH.size:
            raise IntegrityError("a list of block sets is cut off")
        disk, length = _SET_LENGTH.unpack_from(data, offset)
        offset += _SET_LENGTH.size
        sets[disk] = BlockSet.from_bytes(data[offset : offset + length])
        offset += length
    return sets


def _sealed(magic: bytes, public: bytes, packed: bytes) -> bytes:
    """A file: its header, which tells damage anywhere behind itself, and two parts."""
    head = _HEADER.pack(magic, _VERSION, len(public), bytes(_DIGEST_BYTES))[:-_DIGEST_BYTES]
    return head + xxhash.xxh3_128_digest(head + public + packed) + public + packed


def _unsealed(magic: bytes, data: bytes) -> tuple[bytes, bytes]:
    """The two parts of a file; IntegrityError when it is not as it was written."""
    if len(data) < _HEADER.size:
        raise IntegrityError("it is shorter than its header")
    found, version, public_bytes, digest = _HEADER.unpack_from(data)
    if found != magic or version != _VERSION:
        raise IntegrityError(f"it starts with {found!r}, version {version}")
    hasher = xxhash.xxh3_128(data[: _HEADER.size - _DIGEST_BYTES])
    hasher.update(memoryview(data)[_HEADER.size :])
    if hasher.digest() != digest:
        raise IntegrityError("it does not have the digest that it declares")
    end = _HEADER.size + public_bytes
    return data[_HEADER.size : end], data[end:]


def _pack(position: Position, todo: BlockSets) -> bytes:
    pending = position.pending
    public = encode(
        {
            "generation": position.generation,
            "committed": position.committed,
            "used": position.used,
            "used_attempt": position.used_attempt.hex(),
            "attempt": position.attempt.hex(),
            "since": position.since,
            "applied_generation": position.applied.generation,
            "applied_number": position.applied.number,
            "repaired": position.repaired,
            "repairing": position.repairing,
            "seeded": position.seeded,
            "audit_chunk": position.audit_chunk,
            "pending": pending
            and {
                "number": pending.stamp.number,
                "attempt": pending.attempt.hex(),
                "whole": pending.whole,
            },
            "identities": [
                {"disk": disk, "identity": identity.as_json()}
                for disk, identity in sorted(position.identities.items())
            ],
            "basis": position.basis.hex(),
            "origin": position.origin.hex(),
            "resync": position.resync and position.resync.to_tree(),
            "resync_request": position.resync_request,
        }
    )
    return _sealed(_MAGIC, public, _pack_sets(todo))


def _unpack(data: bytes) -> tuple[Position, BlockSets]:
    public, packed = _unsealed(_MAGIC, data)
    tree = Document.decode(public, "state", bytes_max=_JSON_BYTES_MAX)
    generation = tree.uint("generation")
    pending = None
    if "pending" in tree:
        item = tree.document("pending")
        stamp = Stamp(generation, item.uint("number"))
        pending = Pending(stamp, item.hex("attempt", ATTEMPT_BYTES), item.flag("whole"))
    position = Position(
        generation=generation,
        committed=tree.uint("committed"),
        used=tree.uint("used") if "used" in tree else tree.uint("committed"),
        used_attempt=tree.hex(
            "used_attempt" if "used_attempt" in tree else "attempt", ATTEMPT_BYTES
        ),
        attempt=tree.hex("attempt", ATTEMPT_BYTES),
        since=tree.uint("since"),
        applied=Stamp(tree.uint("applied_generation"), tree.uint("applied_number")),
        repaired=tree.uint("repaired"),
        repairing=tree.uint("repairing"),
        seeded=tree.flag("seeded"),
        audit_chunk=tree.uint("audit_chunk"),
        pending=pending,
        identities={
            item.uint("disk"): DeviceIdentity.from_json(item.document("identity").tree)
            for item in tree.documents("identities", DISK_COUNT_MAX)
        },
        basis=tree.hex("basis", BASIS_BYTES) if "basis" in tree else NO_BASIS,
        origin=tree.hex("origin", BASIS_BYTES) if "origin" in tree else NO_BASIS,
        resync=Resync.from_document(tree.document("resync")) if "resync" in tree else None,
        resync_request=tree.uint("resync_request") if "resync_request" in tree else 0,
    )
    return position, _unpack_sets(packed)
