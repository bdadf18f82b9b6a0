"""One process at a time in a folder.

The lock is the kernel's (flock): it ends with the process that holds it, however that ends, and
leaves nothing to clear away. The file that carries it stays.
"""

import fcntl
import os
from typing import Self

from daemon.durable import storage_error
from replication.errors import ReplicationError

LOCK_FILE = "lock"


class FolderLock:
    """A folder held for this process until ``close``, or the end of the context."""

    def __init__(self, folder: str, in_use: ReplicationError, *, name: str = LOCK_FILE) -> None:
        """Take the lock at once or not at all.

        Raises ``in_use`` where another process has it, StorageError where the folder refuses.
        """
        self.path = os.path.join(folder, name)
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error("open", self.path, error) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise in_use from error
        except OSError as error:
            self.close()
            raise storage_error("lock", self.path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go; once more changes nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
