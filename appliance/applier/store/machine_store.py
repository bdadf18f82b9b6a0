"""The store of one machine for its one writer: seal, merge, fold, verify.

Invariants: the base is at a position; the layers of the catalogue cover the positions after it
without a gap; the newest of them is the head. Each visible change is one catalogue transaction,
made after the files that it names are durable; files that the catalogue does not name are adopted
or removed when the store is opened.

Source: docs/STORE.md.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from appliance.applier.store.base_image import NAMES, check_base, check_bases
from appliance.applier.store.base_record import BaseRecord
from appliance.applier.store.extents import overlay
from appliance.applier.store.healing import heal
from appliance.applier.store.holds import HoldBook
from appliance.applier.store.layer_reader import Layer
from appliance.applier.store.layer_writer import LayerFile, LayerWriter
from appliance.applier.store.merge import MERGE_LAYERS_MAX, merge_layers
from appliance.applier.store.model import Damage, Head, LayerRow, Point
from appliance.applier.store.pins import lowest_pin
from appliance.applier.store.reader_store import ReaderStore, machine_folder
from appliance.applier.store.recovery import (
    finish_fold,
    has_begun_fold,
    open_catalogue,
    recover,
    rename_into_layers,
)
from appliance.applier.store.succession import check_follows, check_shapes, zeros_of_lost_blocks
from appliance.applier.store.thinning import THIN_BYTES_MAX, ThinReport, thin
from daemon.durable import make_folder, storage_error
from daemon.folder_lock import FolderLock
from replication.block_set import BLOCK_BYTES
from replication.errors import ConfigError, IntegrityError, UnavailableError

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Sequence

    from appliance.applier.retention import RetentionPolicy
    from appliance.applier.store.catalogue import Catalogue, Chain
    from appliance.applier.store.view import View
    from replication.bookmark import Bookmark, DiskShape


class MachineStore:
    """Base, layers and catalogue of one machine, with the right to change them.

    Methods block on the disk and may be called from several threads: sealing goes on while
    another thread merges or folds, which take turns.
    """

    def __init__(
        self, root: str, machine: uuid.UUID, lock: FolderLock, catalogue: Catalogue
    ) -> None:
        self.machine = machine
        self.folder = machine_folder(root, machine)
        self.reader = ReaderStore(root, machine)
        self._lock = lock
        self._catalogue = catalogue
        self._sealing = threading.Lock()
        self._maintaining = threading.Lock()
        self.holds = HoldBook(self.folder)

    @classmethod
    def open(cls, root: str, machine: uuid.UUID, *, name: str = "") -> MachineStore:
        """Take the machine's lock, repeat or remove what a crash left, and be ready.

        ``name`` is kept when the store is made. Raises UnavailableError when another process
        holds the lock, IntegrityError when the catalogue is unreadable.
        """
        return cls._open(root, machine, name, rebuild=False)

    @classmethod
    def rebuild(cls, root: str, machine: uuid.UUID) -> MachineStore:
        """As ``open``, with a new catalogue made from the layers' headers and ``base.json``."""
        return cls._open(root, machine, "", rebuild=True)

    @classmethod
    def _open(cls, root: str, machine: uuid.UUID, name: str, *, rebuild: bool) -> MachineStore:
        folder = machine_folder(root, machine)
        for part in ("disks", "layers", "pins", "incoming"):
            make_folder(os.path.join(folder, part))
        in_use = UnavailableError(
            f"the store of machine {machine} is in use by another applier: {folder}",
            hint="stop the other one, or leave the machine to it",
        )
        lock = FolderLock(folder, in_use)
        try:
            catalogue = open_catalogue(folder, machine, name, rebuild=rebuild)
            try:
                recover(folder, catalogue)
                return cls(root, machine, lock, catalogue)
            except BaseException:
                catalogue.close()
                raise
        except BaseException:
            lock.close()
            raise

    @property
    def head(self) -> Head | None:
        """The newest position; None before the first changeset."""
        return self._catalogue.head()

    def points(self) -> list[Point]:
        """Recovery points, oldest first."""
        return [p for p in self.chain().points if p.bookmark.consistency.restorable]

    def chain(self) -> Chain:
        """Layers and all positions, those that are no recovery points included."""
        return self._catalogue.chain()

    def damages(self) -> list[Damage]:
        """Rotten places that were found and not yet healed."""
        return self._catalogue.damages()

    def open_view(self, position: int, disk: int) -> View:
        """See ReaderStore.open_view."""
        return self.reader.open_view(position, disk)

    def note_damages(self, damages: Sequence[Damage]) -> None:
        """Remember rotten places that were met: what comes again may heal them."""
        if damages:
            self._catalogue.add_damages(damages)

    def extents_at(self, position: int) -> dict[int, list[tuple[int, int]]]:
        """What the layer that ends at ``position`` holds: (block, count) in order, by disk."""
        row = next((row for row in self.chain().layers if row.last == position), None)
        if row is None:
            return {}
        with self._open_layer(row) as layer:
            found = layer.extents()
        held: dict[int, list[tuple[int, int]]] = {}
        for disk, block, count in zip(
            found.disk.tolist(), found.block.tolist(), found.count.tolist(), strict=True
        ):
            held.setdefault(disk, []).append((block, count))
        return held

    def maintaining(self) -> threading.Lock:
        """Held by whoever changes sealed layers or the base: one at a time."""
        return self._maintaining

    def rename(self, name: str) -> None:
        """What people call the machine from now on; its points are served under that name."""
        if self.chain().name == name:
            return
        with self._maintaining:
            record = BaseRecord.read(self.folder)
            if record is not None:
                replace(record, name=name).write(self.folder)
            self._catalogue.rename(name)

    def forget_damage(self, damage: Damage) -> None:
        """After it was mended, or when its place is no more."""
        self._catalogue.remove_damage(damage.file, damage.offset)

    def begin(self) -> LayerWriter:
        """Start a changeset's layer."""
        return LayerWriter(self._incoming(), self._seal)

    def _seal(
        self,
        writer: LayerWriter,
        bookmark: Bookmark,
        since: int,
        attempt: bytes,
        disks: Sequence[DiskShape],
    ) -> int:
        with self._sealing:
            before = self._catalogue.newest()
            check_shapes(disks)
            parent = check_follows(self.machine, before, bookmark, since, attempt)
            extents = overlay(zeros_of_lost_blocks(before, disks), writer.extents(disks))
            position = before.position + 1 if before else 1
            header = writer.file.finish(
                extents,
                machine=self.machine,
                first=position,
                last=position,
                parent=parent,
                bookmark=bookmark,
                attempt=attempt,
                applied_ns=time.time_ns(),
                disks=disks,
            )
            file, size_bytes = rename_into_layers(self.folder, writer.file.path, header)
            self._catalogue.add(
                LayerRow(position, position, file, size_bytes, len(extents)),
                Point(
                    position=position,
                    bookmark=bookmark,
                    attempt=attempt,
                    applied_ns=header.applied_ns,
                    changed_bytes=extents.block_count * BLOCK_BYTES,
                    verified_ns=None,
                    disks=tuple(disks),
                ),
            )
            return position

    def merge(self, first: int, last: int) -> int:
        """Make one layer of those that cover ``first`` to ``last``; return its size in bytes.

        Positions within are gone afterwards; open views of them stay readable. Raises ConfigError
        when no layers begin and end there, IntegrityError when one is unusable, UnavailableError
        when one of those positions is held.
        """
        with self._maintaining:
            chain = self.chain()
            if chain.folding_to is not None and first <= chain.folding_to:
                raise IntegrityError(
                    f"a fold of machine {self.machine} to {chain.folding_to} is not finished",
                    hint="see why in the log; opening the store again takes it up",
                )
            rows = [r for r in chain.layers if first <= r.first and r.last <= last]
            if not rows or rows[0].first != first or rows[-1].last != last:
                raise ConfigError(f"no layers of machine {self.machine} span {first} to {last}")
            if len(rows) == 1:
                return rows[0].size_bytes
            if len(rows) > MERGE_LAYERS_MAX:
                raise ConfigError(f"{len(rows)} layers are more than {MERGE_LAYERS_MAX} at once")
            return self._merge(rows)

    def _merge(self, rows: Sequence[LayerRow]) -> int:
        first, last = rows[0].first, rows[-1].last
        self.holds.check_free(self.chain, first, last)
        incoming = self._incoming()
        try:
            with contextlib.ExitStack() as stack:
                layers = [stack.enter_context(self._open_layer(row)) for row in rows]
                target = LayerFile(incoming)
                stack.callback(target.close)
                name = f"layers/{first:012d}-{last:012d}.layer"
                header, changed_bytes, damages = merge_layers(layers, target, name)
            with self.holds.deciding():
                self.holds.check_free(self.chain, first, last)
                file, size_bytes = rename_into_layers(self.folder, incoming, header)
                row = LayerRow(first, last, file, size_bytes, header.extent_count)
                self._catalogue.replace(row, changed_bytes, damages)
        except BaseException:
            with contextlib.suppress(OSError):  # what stays is removed at the next open
                os.unlink(incoming)
            raise
        for gone in rows:
            self._remove(gone.file)
        return size_bytes

    def fold_to(self, position: int) -> int:
        """Move the base up to ``position``, a layer's end; return the bytes folded.

        Points before it are gone afterwards. Raises UnavailableError while one of them is held or
        being read, IntegrityError when a layer is unusable.
        """
        folded_bytes = 0
        with self._maintaining:
            chain = self.chain()
            if position != chain.base_position and all(r.last != position for r in chain.layers):
                raise ConfigError(f"no layer of machine {self.machine} ends at {position}")
            for row in chain.layers:
                if row.last <= position:
                    self._fold(row)
                    folded_bytes += row.size_bytes
        return folded_bytes

    def _fold(self, row: LayerRow) -> None:
        if not has_begun_fold(self.folder, row.last):
            # Intent, then pins: a reader pins, then looks for intents, so one sees the other.
            with self.holds.deciding():
                self.holds.check_free(self.chain, 0, row.last)
                self._catalogue.intend_fold(row.last)
            try:
                self._check_pins(row.last)
                check_bases(self.folder, BaseRecord.read(self.folder))
                with self._open_layer(row) as layer:
                    layer.check_whole()  # nothing is begun that cannot be finished
            except BaseException:
                self._catalogue.intend_fold(None)
                raise
        finish_fold(self.folder, self._catalogue, row)

    def _check_pins(self, position: int) -> None:
        pinned = lowest_pin(os.path.join(self.folder, "pins"))
        if pinned is not None and pinned < position:
            raise UnavailableError(
                f"position {pinned} of machine {self.machine} is being read",
                hint="its layers are folded when the reader closes it",
            )

    def thin(
        self, now_ns: int, policy: RetentionPolicy, *, bytes_max: int = THIN_BYTES_MAX
    ) -> ThinReport:
        """One bounded piece of what ``policy`` asks for: see thinning.thin."""
        return thin(self, now_ns, policy, bytes_max=bytes_max)

    def heal(self, disk: int, block: int, data: bytes | memoryview) -> int:
        """Mend the block's rotten copies that ``data`` fits: see healing.heal."""
        return heal(self, disk, block, data)

    def verify(
        self, position: int | None = None, progress: Callable[[int], None] | None = None
    ) -> list[Damage]:
        """Read all data of a position (the newest by default) against its digests.

        Damage is returned and kept in the catalogue; a position without any is marked verified.
        ``progress`` is told the bytes read of the disk under way.
        """
        chain = self.chain()
        if not chain.points:
            return []
        point = chain.points[-1] if position is None else chain.point(position)
        if point is None:
            raise ConfigError(f"machine {self.machine} has no position {position}")
        damages: list[Damage] = []
        for shape in point.disks:
            try:
                with self.open_view(point.position, shape.index) as view:
                    damages += view.find_damage(progress)
            except IntegrityError:
                unusable = self._unusable_files(point.position)
                if not unusable:
                    raise
                damages += unusable
                break
        self._catalogue.add_damages(damages)
        if not damages:
            self._catalogue.verified(point.position, time.time_ns())
        return damages

    def _unusable_files(self, position: int) -> list[Damage]:
        damages = []
        chain = self.chain()
        record = BaseRecord.read(self.folder)
        base = record.point if record is not None else None
        for shape in base.disks if base is not None else ():
            try:
                check_base(self.folder, record, shape.index)
            except IntegrityError:
                files = [f"disks/{shape.index}/{name}" for name in NAMES]
                gone = [f for f in files if not os.path.exists(os.path.join(self.folder, f))]
                damages += [Damage(-1, -1, file, 0, b"", time.time_ns()) for file in gone or files]
        for row in chain.layers:
            try:
                if row.last <= position:
                    with self._open_layer(row) as layer:
                        layer.check_whole()
            except IntegrityError:
                damages.append(Damage(-1, -1, row.file, 0, b"", time.time_ns()))
        return damages

    def _open_layer(self, row: LayerRow) -> Layer:
        try:
            return Layer.open(os.path.join(self.folder, row.file))
        except FileNotFoundError as error:
            raise IntegrityError(
                f"the store of machine {self.machine} lacks {row.file}",
                hint="the file was removed from outside; a resync brings fresh data",
            ) from error

    def _incoming(self) -> str:
        return os.path.join(self.folder, "incoming", secrets.token_hex(8))

    def _remove(self, file: str) -> None:
        path = os.path.join(self.folder, file)
        try:
            os.unlink(path)
        except OSError as error:
            raise storage_error("remove", path, error) from error

    def close(self) -> None:
        self._catalogue.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
