"""Merge neighbouring layers into one: the newest data of each block, nothing else.

Cost grows with what the layers hold, never with the disk. Data is checked while it is copied; a
rotten block keeps the digest that it should have, so that it stays refused.

Source: docs/STORE.md §8.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from appliance.applier.store.extents import ZERO, Extents, joined, overlay_all
from appliance.applier.store.layer_format import EXTENT_COUNT_MAX, LayerHeader, data_offset
from appliance.applier.store.model import Damage
from replication.block_set import BLOCK_BYTES
from replication.checksum import DIGEST_BYTES, block_digests
from replication.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from appliance.applier.store.layer_reader import Layer
    from appliance.applier.store.layer_writer import LayerFile

MERGE_LAYERS_MAX = 64
"""Layers merged at once: bounds open files and memory."""

COPY_BLOCKS = 1024
"""Blocks copied in one write: 4 MiB."""


def merge_layers(
    layers: Sequence[Layer], target: LayerFile, target_name: str
) -> tuple[LayerHeader, int, list[Damage]]:
    """Write what ``layers`` (oldest first, neighbours) hold together into ``target``, durably.

    Returns the header, the bytes covered and the damage found, whose places are in
    ``target_name``. Raises IntegrityError when a layer's index or digests are unusable.
    """
    # A number left free after each layer: runs of two layers are never joined into one.
    starts = np.cumsum([0, *(layer.header.data_blocks + 1 for layer in layers)])
    live = overlay_all(
        [
            layer.extents().shifted(int(first))
            for layer, first in zip(layers, starts[:-1], strict=True)
        ]
    )
    if len(live) > EXTENT_COUNT_MAX:
        raise IntegrityError(f"{target_name} would hold {len(live)} extents")
    with_data = live.with_data()
    with_data = with_data.take(np.argsort(with_data.data, kind="stable"))
    damages: list[Damage] = []
    for nth, layer in enumerate(layers):
        low, high = np.searchsorted(with_data.data, starts[nth : nth + 2])
        of_layer = with_data.take(slice(int(low), int(high))).shifted(-int(starts[nth]))
        if len(of_layer):
            damages += _copy(layer, of_layer, target, target_name)
    copied = Extents(
        with_data.start,
        with_data.count,
        np.concatenate(([0], np.cumsum(with_data.count)[:-1])).astype(np.int64)
        if len(with_data)
        else with_data.data,
    )
    zeros = live.zeros()
    start = np.concatenate((zeros.start, copied.start))
    by_start = np.argsort(start, kind="stable")
    merged = joined(
        Extents(
            start[by_start],
            np.concatenate((zeros.count, copied.count))[by_start],
            np.concatenate((np.full(len(zeros), ZERO, np.int64), copied.data))[by_start],
        )
    )
    oldest, newest = layers[0].header, layers[-1].header
    header = target.finish(
        merged,
        machine=newest.machine,
        first=oldest.first,
        last=newest.last,
        parent=oldest.parent,
        bookmark=newest.bookmark,
        attempt=newest.attempt,
        applied_ns=newest.applied_ns,
        disks=newest.disks,
    )
    return header, merged.block_count * BLOCK_BYTES, damages


def batches(extents: Extents, blocks_max: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """``(disk, block, count, data block)`` in turn, in lists of at most ``blocks_max`` blocks."""
    batch: list[tuple[int, int, int, int]] = []
    room = blocks_max
    for disk, first_block, total, first_data in zip(
        extents.disk.tolist(),
        extents.block.tolist(),
        extents.count.tolist(),
        extents.data.tolist(),
        strict=True,
    ):
        block, count, data = first_block, total, first_data
        while count:
            taken = min(count, room)
            batch.append((disk, block, taken, data))
            block, count, data, room = block + taken, count - taken, data + taken, room - taken
            if room == 0:
                yield batch
                batch, room = [], blocks_max
    if batch:
        yield batch


def read_batch(
    layer: Layer,
    batch: Sequence[tuple[int, int, int, int]],
    digests: memoryview,
    into: memoryview,
) -> tuple[bytes, list[tuple[int, int, int, bytes]]]:
    """Fill ``into`` with the runs of ``batch``; return the digests that they should have.

    Also returned: ``(disk, block, number within the batch, expected)`` of each block that is not
    what its digest says.
    """
    expected = bytearray()
    at = 0
    for _, _, count, data in batch:
        layer.read_into(data, into[at : at + count * BLOCK_BYTES])
        expected += digests[data * DIGEST_BYTES : (data + count) * DIGEST_BYTES]
        at += count * BLOCK_BYTES
    found = block_digests(into[:at])
    rotten: list[tuple[int, int, int, bytes]] = []
    if found != expected:
        nth = 0
        for disk, block, count, _ in batch:
            for step in range(count):
                part = slice(nth * DIGEST_BYTES, (nth + 1) * DIGEST_BYTES)
                if found[part] != expected[part]:
                    rotten.append((disk, block + step, nth, bytes(expected[part])))
                nth += 1
    return bytes(expected), rotten


def _copy(layer: Layer, extents: Extents, target: LayerFile, target_name: str) -> list[Damage]:
    digests = layer.digests()
    buffer = memoryview(bytearray(COPY_BLOCKS * BLOCK_BYTES))
    damages = []
    for batch in batches(extents, COPY_BLOCKS):
        expected, rotten = read_batch(layer, batch, digests, buffer)
        first = target.append(buffer[: len(expected) // DIGEST_BYTES * BLOCK_BYTES], expected)
        damages += [
            Damage(disk, block, target_name, data_offset(first + nth), wanted, time.time_ns())
            for disk, block, nth, wanted in rotten
        ]
    return damages
