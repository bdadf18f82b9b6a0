"""What a recovery point holds, read from the store as any reader reads it."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import xxhash

from appliance.applier.store import ReaderStore, View
from tests.e2e.disk import run

PIECE_BYTES = 1 << 20
_MOUNT_OPTIONS = {"ext4": "loop", "xfs": "loop,nouuid"}


def assert_equals(view: View, image: Path) -> None:
    """Every byte of the view is the image's."""
    assert view.size_bytes == image.stat().st_size
    differing = []
    with image.open("rb") as file:
        for offset in range(0, view.size_bytes, PIECE_BYTES):
            ours, theirs = view.read(offset, PIECE_BYTES), file.read(PIECE_BYTES)
            if ours != theirs:
                differing += [
                    (offset + at) // 4096
                    for at in range(0, len(theirs), 4096)
                    if ours[at : at + 4096] != theirs[at : at + 4096]
                ]
    where = f"{view.point.bookmark.stamp} ({view.point.bookmark.consistency.value})"
    assert not differing, (
        f"disk {view.disk} at {where}: {len(differing)} blocks differ, first {differing[:20]}"
    )


def digest(store: ReaderStore, position: int, disk: int) -> str:
    """Of every byte of the disk at the position."""
    total = xxhash.xxh3_128()
    with store.open_view(position, disk) as view:
        for run_ in view.extents():
            total.update(f"{run_.offset}+{run_.length} {run_.is_data}".encode())
            if run_.is_data:
                for offset in range(run_.offset, run_.offset + run_.length, PIECE_BYTES):
                    part = min(PIECE_BYTES, run_.offset + run_.length - offset)
                    total.update(view.read(offset, part))
    return total.hexdigest()


def export(view: View, path: Path) -> None:
    """Write the disk as a sparse image."""
    with path.open("wb") as file:
        file.truncate(view.size_bytes)
        for run_ in view.extents():
            if run_.is_data:
                for offset in range(run_.offset, run_.offset + run_.length, PIECE_BYTES):
                    part = min(PIECE_BYTES, run_.offset + run_.length - offset)
                    os.pwrite(file.fileno(), view.read(offset, part), offset)


@contextlib.contextmanager
def mounted(
    store: ReaderStore, position: int, disk: int, file_system: str, scratch: Path
) -> Iterator[Path]:
    """The point's file system on a copy, its journal replayed by the mount."""
    scratch.mkdir(exist_ok=True)
    image = scratch / f"{position}-{disk}.img"
    point = scratch / f"{position}-{disk}"
    point.mkdir(exist_ok=True)
    try:
        with store.open_view(position, disk) as view:
            export(view, image)
        run("mount", "-o", _MOUNT_OPTIONS[file_system], image, point)
        yield point
    finally:
        if os.path.ismount(point):
            subprocess.run(["umount", point], check=True)
        image.unlink(missing_ok=True)
        point.rmdir()
