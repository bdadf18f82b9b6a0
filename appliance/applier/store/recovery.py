"""What opening a store does first: finish or forget what a crash interrupted.

Source: docs/STORE.md §10.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import astuple
from typing import TYPE_CHECKING

from appliance.applier.store.adoption import LayerName, best_way
from appliance.applier.store.base_image import base_sizes, check_bases
from appliance.applier.store.base_record import BaseRecord
from appliance.applier.store.catalogue import REBUILD_HINT, Catalogue, Chain
from appliance.applier.store.fold import fold_layer, overwritten
from appliance.applier.store.holds import read_holds
from appliance.applier.store.layer_reader import Layer
from appliance.applier.store.model import Damage, LayerRow, Point
from daemon.durable import storage_error, sync_folder
from replication.block_set import BLOCK_BYTES
from replication.bookmark import NOTHING, Stamp
from replication.errors import IntegrityError

if TYPE_CHECKING:
    import uuid
    from collections.abc import Sequence

    from appliance.applier.store.layer_format import LayerHeader

_LAYER_NAME = re.compile(r"(\d{12})-(\d{12})\.layer")
_CATALOGUE = "catalogue.sqlite"


def open_catalogue(folder: str, machine: uuid.UUID, name: str, *, rebuild: bool) -> Catalogue:
    """The catalogue of a locked machine folder; made from the layers when there is none.

    The new one becomes visible by a rename, whole.
    """
    path = os.path.join(folder, _CATALOGUE)
    if not rebuild:
        try:
            return Catalogue.open(path)
        except FileNotFoundError:
            pass
    record = BaseRecord.read(folder)
    if record is None:
        if _layer_names(folder):
            raise IntegrityError(
                f"{folder} holds layers, and neither catalogue nor base.json to tell what they are",
                hint="put base.json back, or move the folder away and replicate the machine anew",
            )
        record = BaseRecord(machine, name, point=None, folding_to=None)
        record.write(folder)
    if record.machine != machine:
        raise IntegrityError(f"{folder} is the store of machine {record.machine}, not {machine}")
    pending = os.path.join(folder, "incoming", _CATALOGUE)
    try:
        for suffix in ("", "-wal", "-shm"):
            _unlink(pending + suffix)
        with Catalogue.create(pending, machine, record.name, record.position) as made:
            if record.point is not None:
                made.add_base(record.point)
            if record.folding_to is not None:
                made.intend_fold(record.folding_to)
            _adopt(folder, made)
        # The old one goes before its log: without it, it would say less than it had committed.
        _unlink(path)
        sync_folder(folder)
        for suffix in ("-wal", "-shm"):
            _unlink(path + suffix)
        os.rename(pending, path)
        sync_folder(folder)
    except OSError as error:
        raise storage_error("write", path, error) from error
    return Catalogue.open(path)


def recover(folder: str, catalogue: Catalogue) -> None:
    """Bring files and catalogue to agree; idempotent.

    Raises IntegrityError when the catalogue is older than the base.
    """
    _empty(os.path.join(folder, "incoming"))
    chain = catalogue.chain()
    record = BaseRecord.read(folder)
    if record is not None and record.reach not in (chain.base_position, chain.folding_to):
        raise IntegrityError(
            f"{catalogue.path} says that the base is at position {chain.base_position}, "
            f"base.json that it is at {record.reach}",
            hint=REBUILD_HINT,
        )
    if chain.folding_to is not None:
        _recover_fold(folder, catalogue, chain, chain.folding_to)
    _adopt(folder, catalogue)
    named = {row.file for row in catalogue.chain().layers}
    there = {f"layers/{name}" for name in os.listdir(os.path.join(folder, "layers"))}
    if named <= there:  # else what nobody names may be what a lost transaction made of them
        for file in there - named:
            _unlink(os.path.join(folder, file))


def _recover_fold(folder: str, catalogue: Catalogue, chain: Chain, position: int) -> None:
    row = next((row for row in chain.layers if row.last == position), None)
    if row is None or not has_begun_fold(folder, position):
        catalogue.intend_fold(None)
        return
    try:
        finish_fold(folder, catalogue, row)
    except IntegrityError:
        # Positions before are torn and stay refused; those after need the layer, so they are too.
        catalogue.add_damages([Damage(-1, -1, row.file, 0, b"", time.time_ns())])


def has_begun_fold(folder: str, position: int) -> bool:
    """Whether the base may hold blocks of the layer that ends at ``position``."""
    record = BaseRecord.read(folder)
    return record is not None and position in (record.folding_to, record.position)


def finish_fold(folder: str, catalogue: Catalogue, row: LayerRow) -> None:
    """Fold the oldest layer into the base, from the first step or again after a crash."""
    chain = catalogue.chain()
    base = chain.point(chain.base_position)
    point = chain.point(row.last)
    assert point is not None
    assert row.first == chain.base_position + 1
    record = BaseRecord.read(folder)
    check_bases(folder, record)
    sizes = record.sizes if record is not None else {}
    path = os.path.join(folder, row.file)
    try:
        layer = Layer.open(path)
    except FileNotFoundError as error:
        raise IntegrityError(f"the store lacks {path}", hint="resync the machine") from error
    with layer:
        BaseRecord(chain.machine, chain.name, base, row.last, sizes).write(folder)
        gone = overwritten(layer, catalogue.damages())
        damages = fold_layer(layer, folder)
        sizes = base_sizes(folder, (shape.index for shape in layer.header.disks))
    BaseRecord(chain.machine, chain.name, point, None, sizes).write(folder)
    catalogue.folded(row, damages, gone)
    _unlink(path)


def rename_into_layers(folder: str, path: str, header: LayerHeader) -> tuple[str, int]:
    """Give a finished layer its name, durably; return it and the file's size."""
    file = f"layers/{header.first:012d}-{header.last:012d}.layer"
    try:
        size_bytes = os.stat(path).st_size
        os.rename(path, os.path.join(folder, file))
        sync_folder(os.path.join(folder, "layers"))
    except OSError as error:
        raise storage_error("rename", path, error) from error
    return file, size_bytes


def _adopt(folder: str, catalogue: Catalogue) -> None:
    """Add the layers that follow the head: sealed, but the catalogue never heard of them."""
    newest = catalogue.newest()
    held = {one.position for one in read_holds(folder)}
    left = _layer_names(folder)
    found: dict[LayerName, tuple[LayerRow, Point]] = {}
    while True:
        way = best_way(left, newest.position if newest else 0, held)
        wrong = _first_wrong(folder, catalogue.machine, newest, way, found)
        if wrong is None:
            break
        left.remove(wrong)
    for name in way:
        catalogue.add(*found[name])


def _first_wrong(
    folder: str,
    machine: uuid.UUID,
    newest: Point | None,
    way: Sequence[LayerName],
    found: dict[LayerName, tuple[LayerRow, Point]],
) -> LayerName | None:
    """The first layer of ``way`` that is not what its name says, or does not follow.

    ``found``: what those are that were looked at.
    """
    parent = newest.bookmark.stamp if newest else NOTHING
    for name in way:
        if name not in found:
            read = _read_layer(folder, machine, name, parent)
            if read is None:
                return name
            found[name] = read
        parent = found[name][1].bookmark.stamp
    return None


def _read_layer(
    folder: str, machine: uuid.UUID, name: LayerName, parent: Stamp
) -> tuple[LayerRow, Point] | None:
    file = f"layers/{name.file}"
    path = os.path.join(folder, file)
    try:
        with Layer.open(path) as layer:
            header = layer.header
            covered = (header.first, header.last)
            if (header.machine, header.parent, covered) != (machine, parent, astuple(name)):
                return None
            extents = layer.check_whole()
    except IntegrityError:
        return None  # it was never acknowledged; the changeset is applied again
    return (
        LayerRow(header.first, header.last, file, os.stat(path).st_size, len(extents)),
        Point(
            position=header.last,
            bookmark=header.bookmark,
            attempt=header.attempt,
            applied_ns=header.applied_ns,
            changed_bytes=extents.block_count * BLOCK_BYTES,
            verified_ns=None,
            disks=header.disks,
        ),
    )


def _layer_names(folder: str) -> set[LayerName]:
    names = os.listdir(os.path.join(folder, "layers"))
    matches = [match for name in names if (match := _LAYER_NAME.fullmatch(name))]
    return {LayerName(int(match[1]), int(match[2])) for match in matches}


def _empty(folder: str) -> None:
    for name in os.listdir(folder):
        _unlink(os.path.join(folder, name))


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise storage_error("remove", path, error) from error
