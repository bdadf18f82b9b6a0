"""A cache storage account in a local folder: ``<folder>/<container>/<blob name>``.

For changesets that come on a medium where no network leads, and for measuring. Names beside the
blobs that end in ``.new`` are being written and are no blobs yet. There is no queue; sweeps find
what is new. A lease is a lock of the operating system and ends with the process.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Container, Iterator

from appliance.applier.cache_account import BLOBS_LISTED_MAX, CacheBlob, refuse_endless
from daemon.durable import make_folder, storage_error, write_whole
from replication.cache_layout import CONTROL_CONTAINER
from replication.errors import UnavailableError

PENDING_SUFFIX = ".new"
_LOCK_SUFFIX = ".lock"


class FolderAccount:
    """See ``CacheAccount``."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._locks: dict[str, int] = {}

    async def containers(self, prefix: str) -> list[str]:
        return await asyncio.to_thread(self._containers, prefix)

    async def blobs(self, container: str, prefix: str) -> list[CacheBlob]:
        return await asyncio.to_thread(self._blobs, container, prefix)

    async def read(self, container: str, name: str, bytes_max: int) -> bytes | None:
        return await asyncio.to_thread(self._read, container, name, bytes_max)

    async def write(self, container: str, name: str, data: bytes) -> None:
        path = self._path(container, name)
        await asyncio.to_thread(make_folder, os.path.dirname(path))
        await asyncio.to_thread(write_whole, path, data)

    async def drop(self, container: str) -> None:
        path = self._path(container)
        with _told("drop", path), contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(shutil.rmtree, path)

    async def hold(self, name: str, owner: uuid.UUID) -> bool:  # noqa: ARG002 - the process owns it
        if name in self._locks:
            return True
        path = self._path(CONTROL_CONTAINER, name) + _LOCK_SUFFIX
        await asyncio.to_thread(make_folder, os.path.dirname(path))
        with _told("open", path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._locks[name] = fd
        return True

    async def release(self, name: str, owner: uuid.UUID) -> None:  # noqa: ARG002
        if (fd := self._locks.pop(name, None)) is not None:
            os.close(fd)

    async def wakes(self, mine: Container[str]) -> set[str]:  # noqa: ARG002
        return set()

    async def close(self) -> None:
        for fd in self._locks.values():
            os.close(fd)
        self._locks.clear()

    def _containers(self, prefix: str) -> list[str]:
        with _told("list", self._folder):
            try:
                return sorted(name for name in os.listdir(self._folder) if name.startswith(prefix))
            except FileNotFoundError as error:
                raise UnavailableError(
                    f"the cache folder {self._folder} is not there",
                    hint="mount it, or correct cache.folder; the applier goes on when it is back",
                ) from error

    def _blobs(self, container: str, prefix: str) -> list[CacheBlob]:
        root = self._path(container)
        found = []
        # Prefixes that are asked for end at a folder, so only what is under it is walked.
        for folder, _, files in os.walk(os.path.join(root, os.path.dirname(prefix))):
            for file in files:
                path = os.path.join(folder, file)
                name = os.path.relpath(path, root)
                if not name.startswith(prefix) or file.endswith((PENDING_SUFFIX, _LOCK_SUFFIX)):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    seen = os.stat(path)
                    version = f"{seen.st_ino}.{seen.st_mtime_ns}"
                    found.append(CacheBlob(name, seen.st_size, version))
                    refuse_endless(f"blobs {container}/{prefix}*", len(found), BLOBS_LISTED_MAX)
        return sorted(found, key=lambda blob: blob.name)

    def _read(self, container: str, name: str, bytes_max: int) -> bytes | None:
        path = self._path(container, name)
        try:
            with _told("read", path), open(path, "rb") as file:
                return file.read(min(os.fstat(file.fileno()).st_size, bytes_max + 1))
        except FileNotFoundError:
            return None

    def _path(self, *names: str) -> str:
        return os.path.join(self._folder, *names)


@contextlib.contextmanager
def _told(verb: str, path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise storage_error(verb, path, error) from error
