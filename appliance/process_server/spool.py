"""Changesets on stable storage until they are applied. Files alone: no order, no network.

    <spool>/lock                                                 held while a process serves it
    <spool>/incoming/<any>                                       segments on their way in
    <spool>/<machine>/ledger.json                                what was committed, though pruned
    <spool>/<machine>/<generation:08>/<number:012>/<attempt>/    one attempt
        <segment:06>.<digest>.<first frame>.<frame count>        a whole segment
        manifest                                                 makes the attempt the changeset

Everything under a machine is renamed into place after its fsync, so what has a name there is
whole. An attempt without a manifest is not committed. The manifest is the first to go when a
changeset is pruned, and the ledger knows of it by then: what a crash leaves is an attempt that
does not count. Methods block: call them in threads.
"""

import contextlib
import errno
import json
import os
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from appliance.process_server.order import Position
from appliance.process_server.segment_file import AttemptId, Segment, SegmentFile
from daemon.durable import make_folder, storage_error, sync_folder, write_whole
from daemon.folder_lock import FolderLock
from replication.bookmark import Stamp
from replication.document import Document
from replication.errors import ConfigError, IntegrityError, OutOfOrderError, PeerError, StorageError
from replication.manifest import Manifest, read_public

MANIFEST_FILE = "manifest"
LEDGER_FILE = "ledger.json"
INCOMING_FOLDER = "incoming"
_LEDGER_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Ledger:
    """What must outlast the changesets themselves.

    durable_ns: time of the newest bookmark whose changeset has been whole in the cache.
    """

    position: Position
    durable_ns: int = 0


@dataclass(frozen=True, slots=True)
class StoredAttempt:
    """An attempt as a start finds it; a committed one has a manifest.

    began: orders attempts by when their first segment came.
    """

    id: AttemptId
    segments: tuple[Segment, ...]
    began: int
    manifest: Manifest | None = None
    manifest_digest: bytes = b""
    manifest_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StoredMachine:
    """All that a start finds of one machine."""

    machine: uuid.UUID
    ledger: Ledger | None
    attempts: tuple[StoredAttempt, ...]


class Spool:
    """A spool folder, held by this process until it is closed."""

    def __init__(self, folder: str) -> None:
        """Open ``folder``, made if it is missing, and empty its incoming folder.

        Raises ConfigError when another process holds it, StorageError when it cannot be used.
        """
        self.folder = folder
        self._incoming = os.path.join(folder, INCOMING_FOLDER)
        make_folder(self._incoming)
        in_use = ConfigError(
            f"the spool {folder} is in use by another process",
            hint="a spool belongs to one process server: end the other or configure another folder",
        )
        self._lock = FolderLock(folder, in_use)
        for name in os.listdir(self._incoming):
            os.unlink(os.path.join(self._incoming, name))

    def close(self) -> None:
        self._lock.close()

    def load(self) -> list[StoredMachine]:
        """Read everything that is there; raise IntegrityError when a part of it is damaged."""
        return [
            self._load_machine(machine)
            for name in sorted(os.listdir(self.folder))
            if (machine := _machine_of(name)) is not None
        ]

    def receive(self, expected: AttemptId) -> SegmentFile:
        """A file for a segment on its way in."""
        return SegmentFile(os.path.join(self._incoming, secrets.token_hex(8)), expected)

    def make_attempt(self, attempt: AttemptId) -> None:
        """Make the folder for an attempt's segments, durably."""
        make_folder(self._folder_of(attempt))

    def place(self, attempt: AttemptId, file: SegmentFile, segment: Segment) -> None:
        """Give a finished file its name; durable after ``sync``."""
        path = os.path.join(self._folder_of(attempt), segment.file_name)
        try:
            os.rename(file.path, path)
        except OSError as error:
            raise storage_error("rename into", path, error) from error

    def sync(self, attempt: AttemptId) -> None:
        """Make the names of an attempt's segments durable."""
        folder = self._folder_of(attempt)
        try:
            sync_folder(folder)
        except FileNotFoundError as error:
            raise OutOfOrderError(
                f"{attempt} was dropped: another attempt took its place",
                hint="ask for the state and go on from there",
            ) from error
        except OSError as error:
            raise storage_error("sync", folder, error) from error

    def write_manifest(self, attempt: AttemptId, content: bytes) -> None:
        """Commit an attempt whose segments are all placed; also makes their names durable."""
        write_whole(os.path.join(self._folder_of(attempt), MANIFEST_FILE), content)

    def read_manifest(self, attempt: AttemptId) -> bytes:
        return self._read(os.path.join(self._folder_of(attempt), MANIFEST_FILE))

    def read_segment(self, attempt: AttemptId, segment: Segment) -> bytes:
        """Raise IntegrityError when the bytes are not those that were received."""
        path = os.path.join(self._folder_of(attempt), segment.file_name)
        content = self._read(path)
        if xxhash.xxh3_128_digest(content) != segment.digest:
            raise _damaged(path, "its digest does not match")
        return content

    def write_ledger(self, machine: uuid.UUID, ledger: Ledger) -> None:
        position = ledger.position
        tree = {
            "generation": position.committed.generation,
            "number": position.committed.number,
            "attempt": position.attempt.hex(),
            "digest": position.digest.hex(),
            "applied_generation": position.applied.generation,
            "applied_number": position.applied.number,
            "durable_ns": ledger.durable_ns,
        }
        make_folder(os.path.join(self.folder, str(machine)))
        path = os.path.join(self.folder, str(machine), LEDGER_FILE)
        write_whole(path, json.dumps(tree, indent=1).encode() + b"\n")

    def drop(self, attempt: AttemptId) -> None:
        """Remove an attempt, its manifest first. Fine if it is gone."""
        folder = self._folder_of(attempt)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, MANIFEST_FILE))
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(folder):
                    os.unlink(os.path.join(folder, name))
                os.rmdir(folder)
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(os.path.dirname(folder))
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # another attempt at the same changeset
                raise storage_error("remove", folder, error) from error

    def _folder_of(self, attempt: AttemptId) -> str:
        stamp = attempt.stamp
        return os.path.join(
            self.folder,
            str(attempt.machine),
            f"{stamp.generation:08}",
            f"{stamp.number:012}",
            attempt.attempt.hex(),
        )

    def _load_machine(self, machine: uuid.UUID) -> StoredMachine:
        folder = os.path.join(self.folder, str(machine))
        for name in os.listdir(folder):
            if name.startswith(f"{LEDGER_FILE}."):  # on its way in, at a crash
                os.unlink(os.path.join(folder, name))
        found = [self._load_attempt(path, attempt) for path, attempt in _attempts(folder, machine)]
        return StoredMachine(machine, _load_ledger(os.path.join(folder, LEDGER_FILE)), tuple(found))

    def _load_attempt(self, folder: str, attempt: AttemptId) -> StoredAttempt:
        segments = []
        manifest, content = None, b""
        for entry in os.scandir(folder):
            if entry.name == MANIFEST_FILE:
                content = self._read(entry.path)
                try:
                    manifest = read_public(content)
                except PeerError as error:
                    raise _damaged(entry.path, str(error)) from error
            elif segment := Segment.from_file_name(entry.name, entry.stat().st_size):
                segments.append(segment)
            else:  # a manifest on its way in, at a crash
                os.unlink(entry.path)
        segments.sort(key=lambda segment: segment.index)
        if manifest is not None:
            del segments[len(manifest.segments) :]  # sent, but not made part of it
            there = [(one.index, one.size_bytes, one.digest) for one in segments]
            listed = [(i, one.size_bytes, one.digest) for i, one in enumerate(manifest.segments)]
            if there != listed:
                raise _damaged(folder, "its segments are not those of its manifest")
        return StoredAttempt(
            id=attempt,
            segments=tuple(segments),
            began=os.stat(folder).st_ctime_ns,
            manifest=manifest,
            manifest_digest=xxhash.xxh3_128_digest(content),
            manifest_bytes=len(content),
        )

    def _read(self, path: str) -> bytes:
        try:
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error("read", path, error) from error


def _load_ledger(path: str) -> Ledger | None:
    try:
        with open(path, "rb") as file:
            content = file.read(_LEDGER_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error("read", path, error) from error
    try:
        tree = Document.decode(content, "ledger", bytes_max=_LEDGER_BYTES_MAX)
        position = Position(
            committed=Stamp(tree.uint("generation"), tree.uint("number")),
            attempt=tree.hex("attempt", 16),
            digest=tree.hex("digest", 16),
            applied=Stamp(tree.uint("applied_generation"), tree.uint("applied_number")),
        )
        return Ledger(position, tree.uint("durable_ns"))
    except PeerError as error:
        raise _damaged(path, str(error)) from error


def _attempts(folder: str, machine: uuid.UUID) -> Iterator[tuple[str, AttemptId]]:
    for generation in _folders(folder):
        for number in _folders(generation.path):
            for attempt in _folders(number.path):
                try:
                    stamp = Stamp(int(generation.name), int(number.name))
                    found = AttemptId(machine, stamp, bytes.fromhex(attempt.name))
                except ValueError as error:
                    raise StorageError(
                        f"{attempt.path} is not of this spool", hint="move it away"
                    ) from error
                yield attempt.path, found


def _folders(path: str) -> list["os.DirEntry[str]"]:
    return sorted((entry for entry in os.scandir(path) if entry.is_dir()), key=lambda e: e.name)


def _machine_of(name: str) -> uuid.UUID | None:
    try:
        machine = uuid.UUID(name)
    except ValueError:
        return None
    return machine if str(machine) == name else None


def _damaged(path: str, reason: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is damaged: {reason}",
        hint="stop the process server and remove the machine's folder from the spool: "
        "its agent then sends again what is not applied",
    )
