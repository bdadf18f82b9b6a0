"""Write a view to a raw image file, holes kept."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from appliance.applier.store.layer_writer import write_all
from daemon.durable import storage_error, sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from appliance.applier.store.view import View

EXPORT_BYTES = 4 << 20


def export(view: View, output_path: str, progress: Callable[[int, int], None] | None = None) -> int:
    """Write ``view`` to ``output_path``, replacing it durably; return the bytes of data.

    ``progress`` is told the offset reached and the disk's size. The file appears under its name
    only when it is whole. Raises RottenBlockError rather than writing a wrong block.
    """
    pending = f"{output_path}.{os.getpid()}.part"
    data_bytes = 0
    try:
        fd = os.open(pending, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, view.size_bytes)
            for run in view.extents():
                if not run.is_data:
                    continue
                for at in range(run.offset, run.offset + run.length, EXPORT_BYTES):
                    data = view.read(at, min(EXPORT_BYTES, run.offset + run.length - at))
                    write_all(fd, memoryview(data), at)
                    data_bytes += len(data)
                    if progress is not None:
                        progress(at + len(data), view.size_bytes)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(pending, output_path)
        sync_folder(os.path.dirname(os.path.abspath(output_path)))
    except OSError as error:
        _forget(pending)
        raise storage_error("write", output_path, error) from error
    except BaseException:
        _forget(pending)
        raise
    if progress is not None:
        progress(view.size_bytes, view.size_bytes)
    return data_bytes


def _forget(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
