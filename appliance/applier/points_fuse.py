"""Every point of every machine as read-only files, without copying.

``<mount>/<machine>/<point>/disk0.img`` is a disk at that point, ``point.json`` beside it says what
it is, and ``<mount>/<machine>/latest`` leads to the newest point. A machine's id leads to its
folder as well, whatever people call it: it is not listed, and no new name changes it. A block that
is not what its digest says is an I/O error for the reader and a line in the log. Reading runs in
threads: reads and digests leave the interpreter to others.

Source: docs/STORE.md §7.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyfuse3
import pyfuse3.asyncio
import structlog

from appliance.applier.points_mount import READ_BYTES_MAX, read_ahead, unmount_stale
from appliance.applier.store.export import export
from appliance.applier.store.point_names import (
    LATEST,
    describe_point,
    disk_name,
    machine_names,
    point_name,
)
from appliance.applier.store.view_cache import ViewCache
from daemon.durable import make_folder
from replication.errors import (
    ConfigError,
    IntegrityError,
    StorageError,
    UnavailableError,
)

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator, Sequence

    from appliance.applier.store.model import Point
    from appliance.applier.store.reader_store import ReaderStore
    from appliance.applier.store.view import View

__all__ = ["export", "serve_points"]

READ_THREADS = 4
INLINE_BYTES_MAX = 16 << 10
"""Reads up to this are done at once: handing them to a thread costs more than they do."""
TASKS_MAX = 32
FOLDER_SECONDS = 1.0
"""How long the kernel may believe a listing; files never change, so those it may keep."""
MISS_SECONDS = 0.1
"""How old the listing of machines is before one that it lacks is looked for anew: that costs."""
FILE_SECONDS = 300.0
LOOK_SECONDS = 2.0
"""Between two looks for views that nobody reads, or whose machine is gone."""
_DESCRIPTION = "point.json"


@dataclass(frozen=True, slots=True)
class Node:
    """A place in the tree; parts that lie deeper are None. A file is ``disk`` or the description.

    disk:       number of the disk; -1 for the description.
    applied_ns: when the position was applied. A store that was put back or begun anew uses
                positions again, and the kernel keeps what it has read of a file by its node.
    """

    machine: str | None = None
    position: int | None = None
    disk: int | None = None
    is_latest: bool = False
    applied_ns: int = 0


class PointsTree(pyfuse3.Operations):
    """The file system; one event loop, with threads for what touches the disk."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, store_root: str) -> None:
        super().__init__()
        self._root = store_root
        self._began_ns = time.time_ns()
        self._views = ViewCache()
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="points")
        self._inodes: dict[Node, int] = {Node(): pyfuse3.ROOT_INODE}
        self._nodes: dict[int, Node] = {pyfuse3.ROOT_INODE: Node()}
        self._lookups: dict[int, int] = {}
        self._next_inode = pyfuse3.ROOT_INODE + 1
        self._open: dict[int, View | bytes | list[tuple[str, Node]]] = {}
        self._next_handle = 1
        self._listed_machines: tuple[float, dict[str, ReaderStore]] = (0.0, {})
        self._listed_points: dict[uuid.UUID, tuple[float, dict[int, Point]]] = {}
        self._log = structlog.get_logger()

    async def lookup(self, parent_inode: int, name: bytes, _ctx: Any = None) -> Any:
        node = await self._call(self._child, self._node(parent_inode), os.fsdecode(name))
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        inode = self._inode(node)
        self._lookups[inode] = self._lookups.get(inode, 0) + 1
        return await self._attributes(inode)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            left = self._lookups.get(inode, 0) - count
            if left > 0:
                self._lookups[inode] = left
                continue
            self._lookups.pop(inode, None)
            if inode != pyfuse3.ROOT_INODE and inode in self._nodes:
                del self._inodes[self._nodes.pop(inode)]

    async def getattr(self, inode: int, _ctx: Any = None) -> Any:
        return await self._attributes(inode)

    async def readlink(self, inode: int, _ctx: Any = None) -> bytes:
        node = self._node(inode)
        _, points = await self._call(self._points, node.machine)
        if not points:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return os.fsencode(point_name(points[-1]))

    async def opendir(self, inode: int, _ctx: Any) -> int:
        return self._handle(await self._call(self._children, self._node(inode)))

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        entries = self._open[fh]
        assert isinstance(entries, list)
        for at in range(start_id, len(entries)):
            name, node = entries[at]
            inode = self._inode(node)
            try:
                attributes = await self._attributes(inode)
            except pyfuse3.FUSEError:  # thinned since it was listed
                continue
            if not pyfuse3.readdir_reply(token, os.fsencode(name), attributes, at + 1):
                return
            self._lookups[inode] = self._lookups.get(inode, 0) + 1

    async def releasedir(self, fh: int) -> None:
        del self._open[fh]

    async def open(self, inode: int, flags: int, _ctx: Any) -> Any:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise pyfuse3.FUSEError(errno.EROFS)
        node = self._node(inode)
        store, point = await self._call(self._point, node)
        if node.disk is None:
            raise pyfuse3.FUSEError(errno.EISDIR)
        if node.disk < 0:
            content: View | bytes = describe_point(store, point)
        else:
            content = await self._call(self._views.acquire, store, point, node.disk)
        return pyfuse3.FileInfo(fh=self._handle(content), keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        content = self._open[fh]
        assert not isinstance(content, list)
        if isinstance(content, bytes):
            return content[off : off + size]
        if size <= INLINE_BYTES_MAX:
            with _told_to_kernel(self._log):
                return self._views.read(content, off, size)
        data: bytes = await self._call(self._views.read, content, off, size)
        return data

    async def release(self, fh: int) -> None:
        content = self._open.pop(fh)
        if not isinstance(content, bytes | list):
            await self._call(self._views.release, content)

    async def statfs(self, _ctx: Any) -> Any:
        found = pyfuse3.StatvfsData()
        of_store = await self._call(os.statvfs, self._root)
        found.f_bsize = found.f_frsize = of_store.f_frsize
        found.f_blocks, found.f_files = of_store.f_blocks, len(self._nodes)
        found.f_bfree = found.f_bavail = found.f_ffree = found.f_favail = 0
        found.f_namemax = 255
        return found

    async def close_idle_views(self) -> None:
        """Let go of points that nobody reads any more, or that are no more, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._call(self._views.drop_gone)
            await self._call(self._views.close_idle)

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        self._views.close()

    async def _call(self, work: Callable[..., Any], *given: Any) -> Any:
        """Do blocking work in a thread; errors become the kernel's."""
        with _told_to_kernel(self._log):
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)

    def _children(self, node: Node) -> list[tuple[str, Node]]:
        if node.disk is not None or node.is_latest:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        if node.machine is None:
            return [(name, Node(name)) for name in self._machines()]
        if node.position is None:
            _, points = self._points(node.machine)
            found = [
                (point_name(p), Node(node.machine, p.position, applied_ns=p.applied_ns))
                for p in points
            ]
            if points:
                found.append((LATEST, Node(node.machine, is_latest=True)))
            return found
        _, point = self._point(node)
        files = [(disk_name(s.index), replace(node, disk=s.index)) for s in point.disks]
        return [*files, (_DESCRIPTION, replace(node, disk=-1))]

    def _child(self, parent: Node, name: str) -> Node | None:
        """By its name; what a listing does not have is looked for anew, it may have just come."""
        found = self._find(parent, name)
        if found is None and parent.position is None:
            self._forget_listing(parent)
            found = self._find(parent, name)
        return found

    def _find(self, parent: Node, name: str) -> Node | None:
        if parent.machine is None:
            return Node(name) if self._store_of(name) is not None else None
        return dict(self._children(parent)).get(name)

    def _forget_listing(self, parent: Node) -> None:
        store = self._store_of(parent.machine)
        if store is not None:
            self._listed_points.pop(store.machine, None)
        elif self._listed_machines[0] < time.monotonic() + FOLDER_SECONDS - MISS_SECONDS:
            self._listed_machines = (0.0, {})

    def _store_of(self, name: str | None) -> ReaderStore | None:
        """The machine with that folder, or with that id."""
        machines = self._machines()
        found = machines.get(name or "")
        return found or next((one for one in machines.values() if str(one.machine) == name), None)

    def _machines(self) -> dict[str, ReaderStore]:
        until, machines = self._listed_machines
        if time.monotonic() >= until:
            machines = machine_names(self._root)
            self._listed_machines = (time.monotonic() + FOLDER_SECONDS, machines)
        return machines

    def _listed(self, machine: str | None) -> tuple[ReaderStore, dict[int, Point]]:
        """A machine's points, at most FOLDER_SECONDS old; opening a file looks anew."""
        store = self._store_of(machine)
        if store is None:
            raise ConfigError(f"the store holds no machine called {machine}")
        until, points = self._listed_points.get(store.machine, (0.0, {}))
        if time.monotonic() >= until:
            points = {point.position: point for point in store.points()}
            self._listed_points[store.machine] = (time.monotonic() + FOLDER_SECONDS, points)
        return store, points

    def _points(self, machine: str | None) -> tuple[ReaderStore, list[Point]]:
        store, points = self._listed(machine)
        return store, list(points.values())

    def _point(self, node: Node) -> tuple[ReaderStore, Point]:
        store, points = self._listed(node.machine)
        point = points.get(node.position or 0)
        if point is None or point.applied_ns != node.applied_ns:
            raise ConfigError(f"machine {node.machine} has no point {node.position}")
        return store, point

    def _changed_ns(self, machine: str | None) -> int:
        """The time of a machine's newest point; ours where there is none, and of the top folder."""
        points = self._points(machine)[1] if machine is not None else []
        return points[-1].bookmark.time_ns if points else self._began_ns

    async def _attributes(self, inode: int) -> Any:
        node = self._node(inode)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.entry_timeout = entry.attr_timeout = FOLDER_SECONDS
        entry.st_blksize = READ_BYTES_MAX
        if node.position is None:
            changed_ns = await self._call(self._changed_ns, node.machine)
            entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = changed_ns
        if node.is_latest:
            entry.st_mode = stat.S_IFLNK | 0o777
            return entry
        if node.disk is None:
            entry.st_mode = stat.S_IFDIR | 0o555
            entry.st_nlink = 2
        if node.position is not None:
            store, point = await self._call(self._point, node)
            entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = point.bookmark.time_ns
            if node.disk is not None:
                entry.st_mode = stat.S_IFREG | 0o444
                entry.entry_timeout = entry.attr_timeout = FILE_SECONDS
                sizes = {shape.index: shape.size_bytes for shape in point.disks}
                sizes[-1] = len(describe_point(store, point))
                entry.st_size = sizes[node.disk]
                entry.st_blocks = -(-entry.st_size // 512)
        return entry

    def _node(self, inode: int) -> Node:
        node = self._nodes.get(inode)
        if node is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return node

    def _inode(self, node: Node) -> int:
        inode = self._inodes.get(node)
        if inode is None:
            inode = self._next_inode
            self._next_inode += 1  # never used again: the kernel may keep pages of an old one
            self._inodes[node] = inode
            self._nodes[inode] = node
        return inode

    def _handle(self, content: Any) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._open[handle] = content
        return handle


@contextlib.contextmanager
def _told_to_kernel(log: Any) -> Iterator[None]:
    """Turn our errors into the kernel's; tell the log of those that a reader cannot explain."""
    try:
        yield
    except ConfigError as error:
        raise pyfuse3.FUSEError(errno.ENOENT) from error
    except UnavailableError as error:
        raise pyfuse3.FUSEError(errno.EAGAIN) from error
    except (IntegrityError, StorageError) as error:
        log.log(logging.ERROR, "read refused", code=error.code, reason=str(error))
        raise pyfuse3.FUSEError(errno.EIO) from error
    except OSError as error:
        log.log(logging.ERROR, "read failed", reason=str(error))
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from error


def serve_points(store_root: str, mountpoint: str, *, for_root: bool = False) -> None:
    """Mount the points of ``store_root`` and serve them until SIGTERM, SIGINT or an unmount.

    A mount that a killed process left behind is removed first. The mount is its user's alone, and
    root's where ``for_root`` says so. Raises ConfigError when mounting is refused.
    """
    unmount_stale(mountpoint)
    make_folder(mountpoint, mode=0o755)
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)
    pyfuse3.asyncio.enable()
    tree = PointsTree(os.path.abspath(store_root))
    options = {"ro", "fsname=understudy", "subtype=points", "default_permissions"}
    if for_root:
        options.add("allow_root")
    try:
        pyfuse3.init(tree, os.path.abspath(mountpoint), options)
    except RuntimeError as error:
        tree.close()
        raise ConfigError(
            f"cannot mount points at {mountpoint}: {error}",
            hint="the folder must exist and be free, /dev/fuse and fusermount3 be usable",
        ) from error
    try:
        asyncio.run(_serve(tree, mountpoint))
    finally:
        pyfuse3.close(unmount=True)
        tree.close()


async def _serve(tree: PointsTree, mountpoint: str) -> None:
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, pyfuse3.terminate)
    idle = asyncio.create_task(tree.close_idle_views(), name="idle views")
    ahead = asyncio.create_task(asyncio.to_thread(read_ahead, mountpoint), name="read-ahead")
    try:
        with contextlib.suppress(pyfuse3.asyncio.ClosedResourceError):
            await pyfuse3.main(min_tasks=2, max_tasks=TASKS_MAX)
    finally:
        idle.cancel()
        await asyncio.gather(idle, ahead, return_exceptions=True)
