"""Writes that are there after a power cut, whole or not at all.

Every step that must survive ends in an fsync of the file *and* of the folder that names it; a
rename without the second can be forgotten by the file system.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable

from replication.errors import StorageError


def sync_folder(path: str) -> None:
    """Make the names in ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: str, parts: bytes | Iterable[bytes], *, mode: int = 0o600) -> None:
    """Replace ``path`` with ``parts``: after a crash the old content is there or the new one.

    Raises StorageError (for example on a full disk); the old content is then untouched.
    """
    folder = os.path.dirname(path) or "."
    pending = f"{path}.{secrets.token_hex(4)}.new"
    try:
        fd = os.open(pending, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.writelines([parts] if isinstance(parts, bytes) else parts)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(pending, path)
        sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(pending)
        raise storage_error("write", path, error) from error


def write_new(path: str, content: bytes, *, mode: int = 0o600) -> None:
    """Write ``path`` whole or not at all, and never over what is there.

    Raises FileExistsError when something is, StorageError.
    """
    pending = f"{path}.{secrets.token_hex(4)}.new"
    try:
        fd = os.open(pending, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(content)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.link(pending, path)  # a rename would replace a file that came in between
    except FileExistsError:
        raise
    except OSError as error:
        raise storage_error("write", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(pending)
    sync_folder(os.path.dirname(path) or ".")


def make_folder(path: str, *, mode: int = 0o700) -> None:
    """Create ``path`` and the folders above it, durably; fine if it is there."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(os.path.abspath(path))
    for folder in reversed(missing):
        try:
            os.mkdir(folder, mode)
        except FileExistsError:
            continue
        except OSError as error:
            raise storage_error("create", folder, error) from error
        sync_folder(os.path.dirname(os.path.abspath(folder)))


def storage_error(verb: str, path: str, error: OSError) -> StorageError:
    """An operating system's refusal in words: what, where and what to do."""
    hint = None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "the disk is full: free space or move the folder; nothing acknowledged is lost"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "check owner, mode and mount options of the path"
    elif error.errno == errno.EIO:
        hint = "the disk reports an I/O error: see the kernel log"
    return StorageError(f"cannot {verb} {path}: {error.strerror or error}", hint=hint)
