"""The manifest that ends a changeset: which segments, which disks, what point in time.

The public part is JSON that the appliance reads to route and to check completeness; the sealed
part holds the audit sample, whose digests would tell an onlooker about the data. Both are
authenticated under the attempt's key.

Source: FORMAT.md §6.
"""

import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from replication.block_set import BLOCK_BYTES, BLOCK_COUNT_MAX
from replication.bookmark import (
    NOTHING,
    Bookmark,
    Consistency,
    DiskShape,
    Stamp,
    read_machine,
)
from replication.document import Document, encode
from replication.envelope import AttemptKey, AttemptSealer
from replication.errors import PeerError
from replication.frame import ATTEMPT_BYTES, DISK_COUNT_MAX, FRAME_NUMBER_MAX, TAG_BYTES

MAGIC = b"USM1"
VERSION = 1
SEGMENT_BYTES_MAX = 32 << 20
SEGMENT_COUNT_MAX = 8192
AUDIT_COUNT_MAX = 4096
BASIS_BYTES = 16
NO_BASIS = bytes(BASIS_BYTES)
PUBLIC_BYTES_MAX = 4 << 20
SECRET_BYTES_MAX = 1 << 20
MANIFEST_BYTES_MAX = 16 + PUBLIC_BYTES_MAX + SECRET_BYTES_MAX + TAG_BYTES

_HEADER = struct.Struct("<4sB3sII")
_SECTOR_BYTES = 512
assert _HEADER.size == 16
assert BLOCK_BYTES % _SECTOR_BYTES == 0


@dataclass(frozen=True, slots=True)
class SegmentEntry:
    """One segment of a changeset.

    frame_count: its frames, which follow on those of the segment before.
    size_bytes:  1 to SEGMENT_BYTES_MAX.
    digest:      xxh3-128 of its bytes.
    """

    frame_count: int
    size_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class AuditDigest:
    """Digest of one 64 KiB chunk of a disk at the bookmark (checksum.chunk_digest)."""

    disk: int
    chunk: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a changeset is.

    since:           the number of the bookmark that its blocks are counted from: it holds all
                     that changed after that one, and may be applied to the state at any bookmark
                     from ``since`` to the one before it. Normally the number before its own.
    attempt:         salt of the attempt whose segments these are.
    disks:           all disks of the machine, in ascending index.
    segments:        in order; the frames of all of them are numbered from 0 without a gap.
    changed_bytes:   data and zeros that it carries, before packing.
    captured_ns:     source's clock when the capture began; never after the bookmark.
    pause_ns:        how long file systems were frozen for it; 0 if they were not.
    initial:         part of an initial replication that is not yet complete.
    repaired:        the newest repair request whose blocks it carries; 0 for none.
    applied:         the newest changeset that the agent knows to be applied; number 0 for none.
    tracker:         ``ebpf`` or ``scan``.
    resync:          it begins a resync: it holds nothing and closes the generation before; what
                     follows counts from the state that it finds at the second site.
    basis:           names that state in all that follow in the generation (sums.py); NO_BASIS
                     where the generation began with all blocks.
    origin:          names the stream of a generation that began with all blocks; NO_BASIS in any
                     other one.
    audit:           the audit sample; None where the sealed part was not opened.
    """

    machine: uuid.UUID
    bookmark: Bookmark
    since: int
    attempt: bytes
    disks: tuple[DiskShape, ...]
    segments: tuple[SegmentEntry, ...]
    changed_bytes: int
    captured_ns: int
    pause_ns: int = 0
    initial: bool = False
    repaired: int = 0
    applied: Stamp = NOTHING
    tracker: str = "ebpf"
    resync: bool = False
    basis: bytes = NO_BASIS
    origin: bytes = NO_BASIS
    audit: tuple[AuditDigest, ...] | None = ()

    @property
    def stamp(self) -> Stamp:
        return self.bookmark.stamp

    @property
    def sent_bytes(self) -> int:
        """All segments together, as they travel."""
        return sum(segment.size_bytes for segment in self.segments)

    @property
    def frame_count(self) -> int:
        return sum(segment.frame_count for segment in self.segments)

    def seal(self, sealer: AttemptSealer) -> bytes:
        """The manifest as it travels; ends the attempt.

        Raises PeerError, and leaves the attempt open, when no reader would take the manifest.
        """
        assert (sealer.machine, sealer.stamp, sealer.attempt) == (
            self.machine,
            self.stamp,
            self.attempt,
        )
        public = encode(_public_tree(self))
        secret = encode({"audit": [_audit_tree(item) for item in self.audit or ()]})
        associated = _HEADER.pack(MAGIC, VERSION, bytes(3), len(public), len(secret)) + public
        _read_public_part(public)
        _read_audit(secret)
        return associated + sealer.seal_manifest(associated, secret)


def read_public(data: bytes) -> Manifest:
    """Read what needs no key; ``audit`` is None, and nothing is authenticated.

    Raises PeerError on bad magic, version, lengths or fields.
    """
    return _read_public_part(_split(data)[0])


def open_manifest(data: bytes, data_key: bytes) -> tuple[Manifest, AttemptKey]:
    """Authenticate and read the whole manifest; also the key for its frames.

    Raises PeerError as ``read_public``, IntegrityError when the manifest was altered.
    """
    manifest = read_public(data)
    key = AttemptKey(data_key, manifest.machine, manifest.stamp, manifest.attempt)
    public, sealed = _split(data)
    secret = key.open_manifest(data[: _HEADER.size + len(public)], sealed)
    return replace(manifest, audit=_read_audit(secret)), key


def _read_public_part(public: bytes) -> Manifest:
    manifest = _from_document(Document.decode(public, "manifest", bytes_max=PUBLIC_BYTES_MAX))
    _check(manifest)
    return manifest


def _read_audit(secret: bytes) -> tuple[AuditDigest, ...]:
    tree = Document.decode(secret, "manifest's sealed part", bytes_max=SECRET_BYTES_MAX)
    return tuple(
        AuditDigest(
            item.uint("disk", DISK_COUNT_MAX - 1), item.uint("chunk"), item.hex("digest", 16)
        )
        for item in tree.documents("audit", AUDIT_COUNT_MAX)
    )


def _split(data: bytes) -> tuple[bytes, bytes]:
    if len(data) < _HEADER.size:
        raise PeerError(f"a manifest of {len(data)} bytes is shorter than its header")
    magic, version, reserved, public_bytes, secret_bytes = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise PeerError(f"not a manifest of version {VERSION}: {magic!r} {version}")
    if any(reserved):
        raise PeerError("a manifest has bits set that are reserved")
    if public_bytes > PUBLIC_BYTES_MAX or secret_bytes > SECRET_BYTES_MAX:
        raise PeerError(f"a manifest declares {public_bytes} and {secret_bytes} bytes: too many")
    if len(data) != _HEADER.size + public_bytes + secret_bytes + TAG_BYTES:
        raise PeerError("a manifest does not have the length that it declares")
    sealed_offset = _HEADER.size + public_bytes
    return data[_HEADER.size : sealed_offset], data[sealed_offset:]


def _public_tree(manifest: Manifest) -> dict[str, Any]:
    bookmark = manifest.bookmark
    return {
        "machine": str(manifest.machine),
        "generation": bookmark.stamp.generation,
        "number": bookmark.stamp.number,
        "since": manifest.since,
        "attempt": manifest.attempt.hex(),
        "time_ns": bookmark.time_ns,
        "consistency": bookmark.consistency.value,
        "reason": bookmark.reason,
        "captured_ns": manifest.captured_ns,
        "pause_ns": manifest.pause_ns,
        "initial": manifest.initial,
        "repaired": manifest.repaired,
        "applied_generation": manifest.applied.generation,
        "applied_number": manifest.applied.number,
        "tracker": manifest.tracker,
        "resync": manifest.resync,
        "basis": manifest.basis.hex(),
        "origin": manifest.origin.hex(),
        "changed_bytes": manifest.changed_bytes,
        "disks": [
            {"disk": disk.index, "name": disk.name, "size_bytes": disk.size_bytes}
            for disk in manifest.disks
        ],
        "segments": [
            {
                "frames": segment.frame_count,
                "size_bytes": segment.size_bytes,
                "digest": segment.digest.hex(),
            }
            for segment in manifest.segments
        ],
    }


def _audit_tree(item: AuditDigest) -> dict[str, Any]:
    return {"disk": item.disk, "chunk": item.chunk, "digest": item.digest.hex()}


def _from_document(tree: Document) -> Manifest:
    try:
        consistency = Consistency(tree.text("consistency", 16))
    except ValueError as error:
        raise PeerError(f"manifest.consistency: {error}") from error
    stamp = Stamp(tree.uint("generation", (1 << 32) - 1), tree.uint("number"))
    return Manifest(
        machine=read_machine(tree.text("machine", 36), "manifest.machine"),
        bookmark=Bookmark(stamp, tree.uint("time_ns"), consistency, tree.text("reason")),
        since=tree.uint("since"),
        attempt=tree.hex("attempt", ATTEMPT_BYTES),
        disks=tuple(
            DiskShape(
                item.uint("disk", DISK_COUNT_MAX - 1),
                item.text("name", 255),
                item.uint("size_bytes"),
            )
            for item in tree.documents("disks", DISK_COUNT_MAX)
        ),
        segments=tuple(
            SegmentEntry(
                item.uint("frames", FRAME_NUMBER_MAX),
                item.uint("size_bytes", SEGMENT_BYTES_MAX),
                item.hex("digest", 16),
            )
            for item in tree.documents("segments", SEGMENT_COUNT_MAX)
        ),
        changed_bytes=tree.uint("changed_bytes"),
        captured_ns=tree.uint("captured_ns"),
        pause_ns=tree.uint("pause_ns"),
        initial=tree.flag("initial"),
        repaired=tree.uint("repaired"),
        applied=Stamp(tree.uint("applied_generation", (1 << 32) - 1), tree.uint("applied_number")),
        tracker=tree.text("tracker", 16),
        resync=tree.flag("resync") if "resync" in tree else False,
        basis=tree.hex("basis", BASIS_BYTES) if "basis" in tree else NO_BASIS,
        origin=tree.hex("origin", BASIS_BYTES) if "origin" in tree else NO_BASIS,
        audit=None,
    )


def _check(manifest: Manifest) -> None:
    """Relations between fields that hold in every manifest."""
    stamp = manifest.stamp
    if stamp.generation < 1 or stamp.number < 1 or manifest.since >= stamp.number:
        raise PeerError(f"a manifest says changeset {stamp} since {manifest.since}")
    _check_disks(manifest.disks)
    if any(not segment.frame_count or not segment.size_bytes for segment in manifest.segments):
        raise PeerError(f"the manifest of {stamp} lists an empty segment")
    if manifest.captured_ns > manifest.bookmark.time_ns:
        raise PeerError(f"the manifest of {stamp} says that its capture began after its bookmark")
    if manifest.resync:
        _check_resync(manifest)


def _check_resync(manifest: Manifest) -> None:
    """What begins a resync promises nothing and brings nothing: the state stands as it is."""
    if (
        manifest.since
        or manifest.segments
        or not manifest.initial
        or manifest.bookmark.consistency is not Consistency.NONE
        or manifest.basis != NO_BASIS
    ):
        raise PeerError(f"the manifest of {manifest.stamp} begins a resync and is more than that")


def _check_disks(disks: Sequence[DiskShape]) -> None:
    indexes = [disk.index for disk in disks]
    if not indexes or indexes != sorted(set(indexes)):
        raise PeerError(f"a manifest lists the disks {indexes}, not some in ascending order")
    for disk in disks:
        size_max = BLOCK_COUNT_MAX * BLOCK_BYTES
        if not 0 < disk.size_bytes <= size_max or disk.size_bytes % _SECTOR_BYTES:
            raise PeerError(f"disk {disk.index} cannot have {disk.size_bytes} bytes")
