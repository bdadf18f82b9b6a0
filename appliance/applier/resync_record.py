"""Which state changesets count from: ``resync.json`` in the machine's folder.

Written before the changeset that begins a resync is sealed, with a basis that is chosen anew each
time. Changesets of that generation name the basis that their source has compared with, and are
applied only where it is the one written here: a store that was put back to an older state, or
another store that takes the machine over, begins with a basis of its own, so what was compared
with another state never gets into it.

In a generation that begins with all blocks they name their stream instead. A stream's first
changeset, which counts from nothing, may be applied to whatever there is, and its name is written
before it is sealed; what counts from a changeset is applied to none but its own stream. For where
agent, process server and cache have forgotten a machine of which this store has something, a new
stream begins by the numbers of the old one.

Source: FORMAT.md §6, §10.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from daemon.durable import storage_error, write_whole
from replication.bookmark import Stamp
from replication.errors import IntegrityError
from replication.frame import ATTEMPT_BYTES
from replication.manifest import BASIS_BYTES, NO_BASIS, Manifest
from replication.watermark import RepairRun

RESYNC_FILE = "resync.json"
KEPT_MAX = 2
"""The newest, and the one before: the newest may not have been sealed yet."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A resync as its changeset begins it.

    runs:    the blocks that its sums call different although their digests may not; None before
             the sums are made.
    settled: a point has been applied since: those blocks have come.
    """

    stamp: Stamp
    attempt: bytes
    basis: bytes
    runs: tuple[RepairRun, ...] | None = None
    settled: bool = False


@dataclass(frozen=True, slots=True)
class Origin:
    """A stream as its first changeset begins it: it counts once that is sealed."""

    stamp: Stamp
    attempt: bytes
    name: bytes


class ResyncRecord:
    """The resyncs of a machine; every change is on stable storage when it returns."""

    def __init__(self, folder: str) -> None:
        """Raise IntegrityError when the file there is no such record."""
        self._path = os.path.join(folder, RESYNC_FILE)
        self._begun, self._origins = _read(self._path)

    def find(self, generation: int) -> Begun | None:
        """The resync that ``generation`` began with; None where it began with all blocks."""
        return next((one for one in self._begun if one.stamp.generation == generation), None)

    def at(self, stamp: Stamp, attempt: bytes) -> Begun | None:
        """The resync that begins with exactly this changeset."""
        found = self.find(stamp.generation)
        return found if found and (found.stamp, found.attempt) == (stamp, attempt) else None

    def fits(self, manifest: Manifest, head: Stamp) -> bool:
        """Whether what a changeset counts from is the state of this store, which is at ``head``."""
        begun = self.find(manifest.stamp.generation)
        if begun is not None or manifest.basis != NO_BASIS:
            return begun is not None and manifest.basis == begun.basis
        return manifest.since == 0 or manifest.origin == self._origin(manifest, head)

    def _origin(self, manifest: Manifest, head: Stamp) -> bytes:
        """Of the stream that ``head`` is of, if that is of the changeset's generation."""
        generation = manifest.stamp.generation
        names = [one.name for one in self._sealed(head) if one.stamp.generation == generation]
        return names[-1] if names else NO_BASIS

    def _sealed(self, head: Stamp) -> tuple[Origin, ...]:
        return tuple(one for one in self._origins if one.stamp <= head)

    def note_origin(self, manifest: Manifest, head: Stamp) -> None:
        """A changeset that fits, and begins no resync, is about to be sealed after ``head``."""
        origins = self._sealed(head)
        if manifest.since == 0 and manifest.origin != self._origin(manifest, head):
            begun = Origin(manifest.stamp, manifest.attempt, manifest.origin)
            origins = (*origins, begun)[-KEPT_MAX:]
        if origins != self._origins:
            self._keep(self._begun, origins)

    def begin(self, stamp: Stamp, attempt: bytes) -> None:
        """A changeset that begins a resync is about to be sealed."""
        others = [one for one in self._begun if one.stamp.generation < stamp.generation]
        begun = Begun(stamp, attempt, os.urandom(BASIS_BYTES))
        self._keep((*others, begun)[-KEPT_MAX:], self._origins)

    def note_runs(self, begun: Begun, runs: Sequence[RepairRun]) -> None:
        """Its sums call ``runs`` different. The first word counts: who asked may have those."""
        if begun.runs is None:
            self._change(begun, replace(begun, runs=tuple(runs)))

    def settle(self, begun: Begun) -> None:
        """Everything that differed has come."""
        self._change(begun, replace(begun, runs=(), settled=True))

    def _change(self, before: Begun, after: Begun) -> None:
        changed = tuple(after if one == before else one for one in self._begun)
        self._keep(changed, self._origins)

    def _keep(self, begun: tuple[Begun, ...], origins: tuple[Origin, ...]) -> None:
        tree = {
            "begun": [_tree(one) for one in begun],
            "origins": [_origin_tree(one) for one in origins],
        }
        write_whole(self._path, json.dumps(tree, separators=(",", ":")).encode())
        self._begun, self._origins = begun, origins


def _tree(begun: Begun) -> dict[str, object]:
    runs = begun.runs
    return {
        "generation": begun.stamp.generation,
        "number": begun.stamp.number,
        "attempt": begun.attempt.hex(),
        "basis": begun.basis.hex(),
        "runs": None if runs is None else [[run.disk, run.block, run.count] for run in runs],
        "settled": begun.settled,
    }


def _origin_tree(origin: Origin) -> dict[str, object]:
    return {
        "generation": origin.stamp.generation,
        "number": origin.stamp.number,
        "attempt": origin.attempt.hex(),
        "origin": origin.name.hex(),
    }


def _read(path: str) -> tuple[tuple[Begun, ...], tuple[Origin, ...]]:
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        return (), ()
    except OSError as error:
        raise storage_error("read", path, error) from error
    try:
        tree = json.loads(raw)
        begun = tuple(_begun(item) for item in tree["begun"])
        return begun, tuple(_origin(item) for item in tree.get("origins", ()))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path} is not a record of resyncs: {error}",
            hint="move it away; the machine's next changeset is refused then, and its agent "
            "compares the disks anew",
        ) from error


def _origin(item: dict[str, Any]) -> Origin:
    attempt, name = bytes.fromhex(item["attempt"]), bytes.fromhex(item["origin"])
    if (len(attempt), len(name)) != (ATTEMPT_BYTES, BASIS_BYTES):
        raise ValueError("an attempt or an origin has another length")
    return Origin(Stamp(int(item["generation"]), int(item["number"])), attempt, name)


def _begun(item: dict[str, Any]) -> Begun:
    attempt, basis = bytes.fromhex(item["attempt"]), bytes.fromhex(item["basis"])
    if (len(attempt), len(basis)) != (ATTEMPT_BYTES, BASIS_BYTES):
        raise ValueError("an attempt or a basis has another length")
    runs = item["runs"]
    return Begun(
        Stamp(int(item["generation"]), int(item["number"])),
        attempt,
        basis,
        None if runs is None else tuple(RepairRun(*map(int, run)) for run in runs),
        bool(item["settled"]),
    )
