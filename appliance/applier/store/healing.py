"""Write a fresh block over its rotten copies, where the digest proves that it is the same.

Source: docs/STORE.md §12.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from appliance.applier.store.layer_writer import write_all
from daemon.durable import storage_error
from replication.block_set import BLOCK_BYTES
from replication.checksum import block_digest
from replication.errors import PeerError

if TYPE_CHECKING:
    from appliance.applier.store.machine_store import MachineStore


def heal(store: MachineStore, disk: int, block: int, data: bytes | memoryview) -> int:
    """Mend each recorded damage of the block that ``data`` fits; return how many were mended.

    A block that has changed since does not have the old digest and mends nothing.
    """
    if len(data) != BLOCK_BYTES:
        raise PeerError(f"{len(data)} bytes are not a block of {BLOCK_BYTES}")
    fresh = block_digest(data)
    mended = 0
    with store.maintaining():
        for damage in store.damages():
            if (damage.disk, damage.block, damage.expected) != (disk, block, fresh):
                continue
            path = os.path.join(store.folder, damage.file)
            with contextlib.suppress(FileNotFoundError):
                _write(path, damage.offset, memoryview(data))
                mended += 1
            store.forget_damage(damage)
    return mended


def _write(path: str, offset: int, data: memoryview) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            write_all(fd, data, offset)
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise storage_error("mend", path, error) from error
