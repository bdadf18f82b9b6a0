"""Fold one layer into the base: idempotent, so that a crash in the middle is repeated.

Source: docs/STORE.md §9.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from appliance.applier.store.base_image import BaseImage, base_folder
from appliance.applier.store.extents import key_of
from appliance.applier.store.merge import COPY_BLOCKS, batches, read_batch
from appliance.applier.store.model import Damage
from replication.block_set import BLOCK_BYTES
from replication.checksum import DIGEST_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appliance.applier.store.extents import Extents
    from appliance.applier.store.layer_reader import Layer


def fold_layer(layer: Layer, machine_folder: str) -> list[Damage]:
    """Write the layer's blocks into the bases of its disks and make them durable.

    Every disk that the machine has at the layer's end has a base then, if only an empty one.
    Returns the damage found: those blocks are written with the digest that they should have, so
    they stay refused. Raises IntegrityError when the index or the digests are unusable; the bases
    are then unchanged.
    """
    extents = layer.extents()
    digests = layer.digests()
    damages: list[Damage] = []
    of_machine = {shape.index for shape in layer.header.disks}
    for disk in sorted(of_machine | {int(disk) for disk in extents.disk}):
        with BaseImage.open_for_writing(base_folder(machine_folder, disk)) as base:
            damages += _fold_disk(layer, extents.of_disk(disk), digests, base, disk)
            base.sync()
    return damages


def overwritten(layer: Layer, damages: Sequence[Damage]) -> list[Damage]:
    """Those of ``damages`` that are in the base where the layer has blocks of its own: once it is
    folded they are no more, and what they expected there would be wrong.
    """
    of_base = [damage for damage in damages if damage.file == _file_of(damage.disk)]
    if not of_base:
        return []
    extents = layer.extents()
    found = []
    for damage in of_base:
        key = key_of(damage.disk, damage.block)
        at = int(np.searchsorted(extents.start, key, "right")) - 1
        if at >= 0 and key < extents.end[at]:
            found.append(damage)
    return found


def _file_of(disk: int) -> str:
    return f"disks/{disk}/base.img"


def _fold_disk(
    layer: Layer, extents: Extents, digests: memoryview, base: BaseImage, disk: int
) -> list[Damage]:
    zeros = extents.zeros()
    for block, count in zip(zeros.block.tolist(), zeros.count.tolist(), strict=True):
        base.zero(block, count)
    buffer = memoryview(bytearray(COPY_BLOCKS * BLOCK_BYTES))
    damages = []
    for batch in batches(extents.with_data(), COPY_BLOCKS):
        expected, rotten = read_batch(layer, batch, digests, buffer)
        for block, first, count in _neighbours(batch):
            base.write(
                block,
                buffer[first * BLOCK_BYTES : (first + count) * BLOCK_BYTES],
                memoryview(expected)[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES],
            )
        damages += [
            Damage(
                disk,
                block,
                _file_of(disk),
                block * BLOCK_BYTES,
                wanted,
                time.time_ns(),
            )
            for _, block, _, wanted in rotten
        ]
    return damages


def _neighbours(batch: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int]]:
    """Runs of a batch that are neighbours on the disk, joined: ``(block, first, count)``."""
    joined: list[tuple[int, int, int]] = []
    at = 0
    for _, block, count, _ in batch:
        if joined and joined[-1][0] + joined[-1][2] == block:
            before = joined[-1]
            joined[-1] = (before[0], before[1], before[2] + count)
        else:
            joined.append((block, at, count))
        at += count
    return joined
