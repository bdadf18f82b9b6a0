"""Pins: a reader says which position it needs, in a file whose lock dies with it.

A pin becomes visible under its name only when it is already locked, so a writer that can lock one
knows that its reader is gone. On a full disk, where no file can be made, a reader shares a lock of
the folder itself, which holds all positions.

Source: docs/STORE.md §6.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets

from daemon.durable import storage_error

TAKE_TRIES_MAX = 8
_SUFFIX = ".pin"


class Pin:
    """Holds a position: the base does not move past it while the pin is held."""

    def __init__(self, path: str | None, fd: int) -> None:
        """``path`` is None for one that has no name."""
        self._path = path
        self._fd = fd

    @classmethod
    def take(cls, folder: str, position: int) -> Pin:
        """A pin in ``folder``; only a look at the catalogue afterwards says whether it holds."""
        for _ in range(TAKE_TRIES_MAX):
            salt = secrets.token_hex(8)
            pending = os.path.join(folder, f".{salt}")
            path = os.path.join(folder, f"{position:012d}-{salt}{_SUFFIX}")
            try:
                fd = os.open(pending, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    return cls._take_folder(folder)
                raise storage_error("create", pending, error) from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(pending, path)
            except (FileNotFoundError, BlockingIOError):  # swept before it was locked: once more
                os.close(fd)
                continue
            except OSError as error:
                os.close(fd)
                raise storage_error("create", path, error) from error
            return cls(path, fd)
        raise storage_error("pin", folder, OSError(0, f"swept {TAKE_TRIES_MAX} times"))

    @classmethod
    def _take_folder(cls, folder: str) -> Pin:
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_SH)  # a writer that looks has it for a moment only
        except OSError as error:
            raise storage_error("lock", folder, error) from error
        return cls(None, fd)

    def release(self) -> None:
        if self._fd >= 0:
            if self._path is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path)
            os.close(self._fd)
            self._fd = -1


def lowest_pin(folder: str) -> int | None:
    """The lowest position that a live reader holds; pins of dead ones are removed."""
    lowest = 0 if _is_shared(folder) else None
    for name in os.listdir(folder):
        if _is_dead(os.path.join(folder, name)) or not name.endswith(_SUFFIX):
            continue
        position = int(name.partition("-")[0])
        lowest = position if lowest is None else min(lowest, position)
    return lowest


def _is_shared(folder: str) -> bool:
    """Whether a reader holds all positions, for want of room for a pin of its own."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def _is_dead(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False  # another user's reader; whether it lives cannot be told, so it does
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return True
    finally:
        os.close(fd)
