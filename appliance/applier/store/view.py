"""A view: one disk of one position, readable like a raw image.

Every block that is read is compared with its digest; a block that differs is refused with its
place and never served. Reads from several threads at once are fine.

Source: docs/STORE.md §7.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from appliance.applier.store.block_map import FIRST_DATA, IN_BASE, LAYER_BASE, BlockMap
from appliance.applier.store.layer_format import data_offset
from appliance.applier.store.model import Damage, RottenBlockError
from replication.block_set import BLOCK_BYTES, block_count_of
from replication.checksum import DIGEST_BYTES, ZERO_DIGEST, block_digests

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from appliance.applier.store.base_image import BaseImage
    from appliance.applier.store.layer_reader import Layer
    from appliance.applier.store.model import Point
    from appliance.applier.store.pins import Pin
    from replication.bookmark import DiskShape

WINDOW_BLOCKS = 1 << 16
"""Extents and digests are looked at in windows of 256 MiB."""

READ_BLOCKS = 256


@dataclass(frozen=True, slots=True)
class Run:
    """A part of a view: data, or a hole (all zeros). Bytes; whole blocks but at the end."""

    offset: int
    length: int
    is_data: bool


class View:
    """One disk of one position; holds its files and a pin until it is closed."""

    def __init__(
        self,
        machine: uuid.UUID,
        folder: str,
        point: Point,
        shape: DiskShape,
        *,
        base: BaseImage | None,
        layers: Sequence[Layer],
        pin: Pin,
    ) -> None:
        self.machine = machine
        self.point = point
        self.disk = shape.index
        self.size_bytes = shape.size_bytes
        self.block_count = block_count_of(shape.size_bytes)
        self.folder = folder
        self._base = base
        self._layers = layers
        self._pin = pin
        self._map = BlockMap(
            layers,
            shape.index,
            self.block_count,
            os.path.join(folder, "incoming"),
            has_base=base is not None,
        )

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk, fewer at its end; RottenBlockError rather than a wrong one."""
        end = min(offset + length, self.size_bytes)
        if offset < 0 or offset >= end:
            return b""
        first = offset // BLOCK_BYTES
        count = block_count_of(end) - first
        data = bytearray(count * BLOCK_BYTES)
        self._fill(first, count, data)
        expected = self.block_digests(first, count)
        found = block_digests(data)
        if found != expected:
            raise self._rotten(first, found, expected)
        skip = offset - first * BLOCK_BYTES
        return bytes(memoryview(data)[skip : skip + end - offset])

    def block_digests(self, block: int, count: int) -> bytes:
        """Digests of ``count`` blocks, 16 bytes each, without reading data."""
        assert 0 <= block <= block + count <= self.block_count
        if count == 1:
            return self._block_digest(block)
        sources = self._map.sources[block : block + count]
        found = np.zeros((count, 2), np.uint64)
        in_base = sources == IN_BASE
        if self._base is not None and in_base.any():
            of_base = np.frombuffer(self._base.digests(block, count), np.uint64).reshape(-1, 2)
            found[in_base] = of_base[in_base]
        in_layer = sources >= FIRST_DATA
        if in_layer.any():
            found[in_layer] = self._map.digests[sources[in_layer] - FIRST_DATA]
        return found.tobytes()

    def extents(self) -> Iterator[Run]:
        """Data and holes of the whole disk, in order, neighbours joined."""
        start, was_data = 0, False
        for block in range(0, self.block_count, WINDOW_BLOCKS):
            count = min(WINDOW_BLOCKS, self.block_count - block)
            is_data = self.has_data(block, count)
            changes = np.flatnonzero(np.diff(is_data)) + 1
            for at in (0, *changes.tolist()):
                if bool(is_data[at]) != was_data:
                    if block + at > start:
                        yield self._run(start, block + at, is_data=was_data)
                    start, was_data = block + at, bool(is_data[at])
        if start < self.block_count:
            yield self._run(start, self.block_count, is_data=was_data)

    def find_damage(self, progress: Callable[[int], None] | None = None) -> list[Damage]:
        """Read all data; return every block that is not what its digest says.

        ``progress`` is told the bytes read so far.
        """
        damages: list[Damage] = []
        done_bytes = 0
        for run in self.extents():
            end = block_count_of(run.offset + run.length)
            for block in range(run.offset // BLOCK_BYTES, end if run.is_data else 0, READ_BLOCKS):
                count = min(READ_BLOCKS, end - block)
                data = bytearray(count * BLOCK_BYTES)
                self._fill(block, count, data)
                found, expected = block_digests(data), self.block_digests(block, count)
                if found != expected:
                    damages += self._damages(block, found, expected)
                done_bytes += len(data)
                if progress is not None:
                    progress(done_bytes)
        return damages

    def _block_digest(self, block: int) -> bytes:
        """As ``block_digests`` for one block, without the cost of arrays: random reads."""
        source = int(self._map.sources[block])
        if source >= FIRST_DATA:
            return bytes(self._map.digests[source - FIRST_DATA].data)
        if source == IN_BASE and self._base is not None:
            return bytes(self._base.digests(block, 1))
        return ZERO_DIGEST

    def _fill(self, block: int, count: int, data: bytearray) -> None:
        into = memoryview(data)
        if count == 1:
            source = int(self._map.sources[block])
            if source >= FIRST_DATA:
                layer, data_block = self._map.layer_of(source)
                self._layers[layer].read_into(data_block, into)
            elif source == IN_BASE and self._base is not None:
                self._base.read_into(block, into)
            return
        for first, end, layer, data_block in self._map.runs(block, count):
            part = into[first * BLOCK_BYTES : end * BLOCK_BYTES]
            if layer >= 0:
                self._layers[layer].read_into(data_block, part)
            elif layer == LAYER_BASE and self._base is not None:
                self._base.read_into(block + first, part)

    def has_data(self, block: int, count: int) -> npt.NDArray[np.bool_]:
        """Which of ``count`` blocks must be read to be known: all but proven holes."""
        digests = np.frombuffer(self.block_digests(block, count), np.uint64).reshape(-1, 2)
        has_data: npt.NDArray[np.bool_] = (digests != 0).any(axis=1)
        if self._base is not None:
            # Where the image has data a digest of zeros may be a lost one: reading will tell.
            in_base = self._map.sources[block : block + count] == IN_BASE
            for first, run in self._base.data_runs(block, count):
                part = slice(first - block, first - block + run)
                has_data[part] |= in_base[part]
        return has_data

    def _run(self, first: int, end: int, *, is_data: bool) -> Run:
        offset = first * BLOCK_BYTES
        return Run(offset, min(end * BLOCK_BYTES, self.size_bytes) - offset, is_data)

    def _damages(self, block: int, found: bytes, expected: bytes) -> list[Damage]:
        now_ns = time.time_ns()
        damages = []
        for at in range(0, len(found), DIGEST_BYTES):
            wanted = expected[at : at + DIGEST_BYTES]
            if found[at : at + DIGEST_BYTES] != wanted:
                rotten = block + at // DIGEST_BYTES
                file, offset = self._place(rotten)
                damages.append(Damage(self.disk, rotten, file, offset, wanted, now_ns))
        return damages

    def _rotten(self, block: int, found: bytes, expected: bytes) -> RottenBlockError:
        return RottenBlockError(self.machine, self._damages(block, found, expected)[0])

    def _place(self, block: int) -> tuple[str, int]:
        """The file, relative to the machine's folder, and the offset that a block is read from."""
        source = int(self._map.sources[block])
        if source >= FIRST_DATA:
            layer, data_block = self._map.layer_of(source)
            path = self._layers[layer].path
            return os.path.relpath(path, self.folder), data_offset(data_block)
        return f"disks/{self.disk}/base.img", block * BLOCK_BYTES

    def close(self) -> None:
        for layer in self._layers:
            layer.close()
        if self._base is not None:
            self._base.close()
        self._pin.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
