"""A folder over FUSE with the files of another one, read-only; killed, its reads fail.

``python -m tests.azure_emu.compute.vanishing_point SOURCE MOUNT``
"""

import asyncio
import errno
import os
import stat
import sys
from typing import Any

import pyfuse3
import pyfuse3.asyncio


class Mirror(pyfuse3.Operations):
    """Inode 1 is the folder; the others are its files, by their number in the listing."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self._paths = [os.path.join(source, name) for name in sorted(os.listdir(source))]

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755
        if inode != pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFREG | 0o444
            entry.st_size = os.stat(self._paths[inode - 2]).st_size
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        for number, path in enumerate(self._paths):
            if os.path.basename(path) == os.fsdecode(name):
                return await self.getattr(number + 2)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        descriptor = os.open(self._paths[inode - 2], os.O_RDONLY)
        return pyfuse3.FileInfo(fh=descriptor, direct_io=True)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        return os.pread(fh, size, offset)


async def main(source: str, mount: str) -> None:
    pyfuse3.init(Mirror(source), mount, {"ro", "fsname=vanishing"})
    await pyfuse3.main()


if __name__ == "__main__":
    pyfuse3.asyncio.enable()
    asyncio.run(main(*sys.argv[1:]))
