"""An open layer file: its header, its extents, its data and the digests of that data.

Immutable once sealed, so an open one stays readable after merging or folding removed its name.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

import xxhash

from appliance.applier.store.layer_format import (
    HEADER_BYTES,
    LayerHeader,
    Section,
    data_offset,
    description_section,
    unpack_header,
    unpack_index,
)
from daemon.durable import storage_error
from replication.block_set import BLOCK_BYTES
from replication.checksum import DIGEST_BYTES
from replication.errors import IntegrityError

if TYPE_CHECKING:
    from appliance.applier.store.extents import Extents

_DIGEST_READ_BYTES = 1 << 20


class Layer:
    """One layer file, open for reading; safe to read from several threads."""

    def __init__(self, path: str, fd: int, header: LayerHeader) -> None:
        self.path = path
        self.header = header
        self._fd = fd

    @classmethod
    def open(cls, path: str) -> Layer:
        """Raises FileNotFoundError as it is, IntegrityError when the header is not right."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error("open", path, error) from error
        try:
            page = os.pread(fd, HEADER_BYTES, 0)
            described = description_section(page, path)
            description = os.pread(fd, described.size_bytes, described.offset)
            return cls(path, fd, unpack_header(page, description, path))
        except OSError as error:
            os.close(fd)
            raise storage_error("read", path, error) from error
        except BaseException:
            os.close(fd)
            raise

    def extents(self) -> Extents:
        """Raises IntegrityError when the index is not what was written."""
        return unpack_index(self._section(self.header.index), self.header, self.path)

    def digests(self, into: memoryview | None = None) -> memoryview:
        """Every data block's digest, 16 bytes each, checked against the section's own digest."""
        section = self.header.digests
        if into is None:
            into = memoryview(bytearray(section.size_bytes))
        hasher = xxhash.xxh3_128()
        for at in range(0, section.size_bytes, _DIGEST_READ_BYTES):
            part = into[at : at + _DIGEST_READ_BYTES]
            if read_into(self._fd, part, section.offset + at, self.path) != len(part):
                raise self._rotten("it ends inside its digests")
            hasher.update(part)
        if hasher.digest() != section.digest:
            raise self._rotten("its digests do not have the digest that its header declares")
        return into

    def digests_of(self, data_block: int, count: int) -> bytes:
        """Digests of a few blocks, unchecked."""
        at = self.header.digests.offset + data_block * DIGEST_BYTES
        return os.pread(self._fd, count * DIGEST_BYTES, at)

    def read_into(self, data_block: int, into: memoryview) -> None:
        """Fill ``into`` with data blocks; what the file is too short for becomes zeros."""
        assert data_block + len(into) // BLOCK_BYTES <= self.header.data_blocks
        done = read_into(self._fd, into, data_offset(data_block), self.path)
        if done < len(into):
            into[done:] = bytes(len(into) - done)

    def check_whole(self) -> Extents:
        """Check all sections but the data; return the extents."""
        self.digests()
        return self.extents()

    def _section(self, section: Section) -> bytearray:
        raw = bytearray(section.size_bytes)
        if read_into(self._fd, memoryview(raw), section.offset, self.path) != len(raw):
            raise self._rotten("it is cut short")
        return raw

    def _rotten(self, what: str) -> IntegrityError:
        return IntegrityError(f"the layer {self.path} is unusable: {what}", hint="resync")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_into(fd: int, into: memoryview, offset: int, path: str) -> int:
    """Read until ``into`` is full or the file ends; return the bytes read."""
    done = 0
    try:
        while done < len(into):
            got = os.preadv(fd, [into[done:]], offset + done)
            if got == 0:
                break
            done += got
    except OSError as error:
        raise storage_error("read", path, error) from error
    return done
