"""Freezing file systems for a moment, from the agent's side.

``Freezer`` has a process of its own hold them (``freezer.py``), which thaws when the time limit
passes or the agent dies. A second watch, here, thaws a little later should that process be the one
that died; systemd's ExecStopPost (``understudy-agent thaw``) is for the case that both did.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from agents.mobility import freezer
from agents.mobility.mounts import MOUNTINFO, parse_mountinfo
from replication.errors import CaptureError, ConfigError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agents.mobility.mounts import MountedFileSystem

REPLY_SECONDS_MAX = 5.0
"""How much longer than the time limit a reply of the process is waited for."""

SECOND_WATCH_SECONDS = 1.0
"""How much later than the process the agent itself thaws."""

END_SECONDS_MAX = 2.0
PARALLEL_SYNCS_MAX = 16
LOOP_DEPTH_MAX = 8


@dataclass(frozen=True, slots=True)
class Frozen:
    """File systems that are frozen now, the same instant in all."""

    mount_points: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FreezeResult:
    """How a freeze ended.

    held:     all file systems stayed frozen until ``thaw`` was called.
    pause_ns: from before the first was frozen until the last was thawed, as far as is known.
    reason:   why it did not hold; empty if it did.
    """

    held: bool
    pause_ns: int
    reason: str = ""


class Freezer:
    """The process that freezes, as a context; started anew when it has died.

    Calls come from one thread at a time. Nothing stays frozen after ``thaw`` or the end of the
    context, except a file system whose thaw fails.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._frozen: tuple[str, ...] = ()
        self._since_ns = 0
        self._second_watch: threading.Timer | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._frozen:
            self.thaw()
        self._end()

    @property
    def pid(self) -> int | None:
        """Of the process that holds the freeze; None while there is none."""
        return self._process.pid if self._process else None

    def freeze(
        self,
        mount_points: Sequence[str],
        seconds_max: float,
        *,
        freezing_seconds_max: float | None = None,
    ) -> Frozen:
        """Freeze all, for at most ``seconds_max`` seconds from now.

        freezing_seconds_max: the freezing itself may take so long; as long as all of it by default.

        Raises CaptureError when one cannot be frozen, or not in time; then none stays frozen.
        """
        assert not self._frozen, "thaw comes before the next freeze"
        paths = tuple(dict.fromkeys(mount_points))
        assert paths
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._since_ns = time.monotonic_ns()
        self._watch(paths, seconds_max + SECOND_WATCH_SECONDS)
        within = seconds_max if freezing_seconds_max is None else freezing_seconds_max
        request = {"freeze": paths, "seconds_max": seconds_max, "freezing_seconds_max": within}
        try:
            reply = self._ask(request, within + REPLY_SECONDS_MAX)
        except OSError as error:
            self._give_up(paths)
            raise CaptureError(f"the process that freezes did not answer: {error}") from error
        if not reply["frozen"]:
            self._unwatch()
            told = "; ".join(f"{path}: {why}" for path, why in sorted(reply["reasons"].items()))
            raise CaptureError(
                f"cannot freeze {told or 'the file systems within the time limit'}",
                hint="points say consistency none while this lasts",
            )
        self._frozen = paths
        return Frozen(paths)

    def look(self) -> str:
        """Why what ``freeze`` froze is not frozen any more; empty while it is. It changes nothing:
        ``thaw`` is still to be called.
        """
        assert self._frozen, "freeze comes before look"
        try:
            reply = self._ask({"look": True}, REPLY_SECONDS_MAX)
        except OSError as error:
            if self._channel:  # an answer that comes late must not be taken for another one's
                self._channel.close()
                self._channel = None
            what = "does not answer" if isinstance(error, TimeoutError) else "is gone"
            return f"the process that held the file systems frozen {what}: {error}"
        return "" if reply["held"] else str(reply["reason"])

    def thaw(self) -> FreezeResult:
        """Thaw what ``freeze`` froze, and tell whether it was frozen all the time until now."""
        assert self._frozen, "freeze comes before thaw"
        paths, self._frozen = self._frozen, ()
        try:
            reply = self._ask({"thaw": True}, REPLY_SECONDS_MAX)
        except OSError as error:
            self._give_up(paths)
            pause_ns = time.monotonic_ns() - self._since_ns
            return FreezeResult(
                held=False,
                pause_ns=pause_ns,
                reason=f"the process that held the file systems frozen is gone: {error}",
            )
        self._unwatch()
        return FreezeResult(bool(reply["held"]), int(reply["pause_ns"]), str(reply["reason"]))

    def _start(self) -> None:
        self._end()
        ours, theirs = socket.socketpair()
        with theirs:
            # As a file, without site packages: it starts in a few hundredths of a second.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", freezer.__file__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        self._channel = ours
        try:
            self._read(REPLY_SECONDS_MAX)
        except OSError as error:
            self._end()
            raise CaptureError(f"the process that freezes did not start: {error}") from error

    def _give_up(self, paths: tuple[str, ...]) -> None:
        """Thaw in the place of a process that does not answer."""
        self._unwatch()
        try:
            thaw_all(paths)
        finally:
            self._end(paths)
        # It may have been in the middle of a freeze when it was killed.
        thaw_all(paths)

    def _end(self, paths: tuple[str, ...] = ()) -> None:
        """Let go of the process: it thaws what it holds, and ends."""
        if self._channel:
            self._channel.close()
            self._channel = None
        if self._process:
            try:
                self._process.wait(END_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                # It is stuck in a freeze, and is left to itself: killed, it could not thaw.
                _thaw_after(self._process, paths)
            self._process = None

    def _ask(self, request: dict[str, Any], seconds_max: float) -> dict[str, Any]:
        if not self._channel:
            raise ConnectionError("it has ended")
        self._channel.settimeout(seconds_max)
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        return self._read(seconds_max)

    def _read(self, seconds_max: float) -> dict[str, Any]:
        """One line; OSError when none comes in time or the process has died."""
        assert self._channel
        deadline = time.monotonic() + seconds_max
        line = b""
        while not line.endswith(b"\n"):
            self._channel.settimeout(max(0.001, deadline - time.monotonic()))
            piece = self._channel.recv(1 << 16)
            if not piece:
                raise ConnectionError("it has ended")
            line += piece
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _watch(self, paths: tuple[str, ...], seconds: float) -> None:
        def thaw_late() -> None:
            # EPERM is told to whoever thaws at the end; nobody listens here.
            with contextlib.suppress(CaptureError):
                thaw_all(paths)

        self._second_watch = threading.Timer(seconds, thaw_late)
        self._second_watch.daemon = True
        self._second_watch.start()

    def _unwatch(self) -> None:
        if self._second_watch:
            self._second_watch.cancel()
            self._second_watch.join()  # it must not thaw what is frozen next
            self._second_watch = None


def _thaw_after(process: subprocess.Popen[bytes], paths: tuple[str, ...]) -> None:
    """Thaw once the process has ended: it may have been killed in a freeze that took its time."""

    def wait() -> None:
        process.wait()
        with contextlib.suppress(CaptureError):
            thaw_all(paths)

    threading.Thread(target=wait, daemon=True).start()


def thaw_all(mount_points: Sequence[str]) -> list[str]:
    """Thaw each, and return those that had been frozen.

    Raises CaptureError, after all were tried, when one may not be thawed.
    """
    thawed, refused = [], []
    for path in dict.fromkeys(mount_points):
        try:
            fd = freezer.open_mount(path)
        except OSError:
            continue  # what is not mounted any more cannot be frozen
        try:
            fcntl.ioctl(fd, freezer.FITHAW, 0)
            thawed.append(path)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY):
                refused.append(f"{path}: {error.strerror}")
        finally:
            os.close(fd)
    if refused:
        raise CaptureError(
            f"cannot thaw {'; '.join(refused)}", hint="run `understudy-agent thaw` as root"
        )
    return thawed


def sync_file_systems(mount_points: Sequence[str]) -> None:
    """Write out what is dirty, in all at once, so that a freeze finds little to do.

    Raises StorageError when one reports that it could not.
    """
    paths = list(dict.fromkeys(mount_points))
    if not paths:
        return
    with ThreadPoolExecutor(min(len(paths), PARALLEL_SYNCS_MAX)) as pool:
        list(pool.map(_sync, paths))


def _sync(path: str) -> None:
    try:
        fd = freezer.open_mount(path)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(fd):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(f"cannot sync {path}: {error.strerror}") from error


def refuse_own(file_systems: Sequence[MountedFileSystem], protected_paths: Sequence[str]) -> None:
    """Raise ConfigError if freezing would block what must go on meanwhile.

    protected_paths: files and folders that the agent needs while file systems are frozen: its
    state, its log, the images of its disks, its interpreter. They may be missing still. Followed
    through loop devices: a path on an image on a file system to be frozen is refused too.
    """
    by_dev = {found.dev: found.mount_point for found in file_systems}
    for path in protected_paths:
        place: str | None = os.path.realpath(path)
        for _ in range(LOOP_DEPTH_MAX):
            if place is None:
                break
            dev = _dev_of(place)
            if dev in by_dev:
                below = "" if place == os.path.realpath(path) else f" (by way of {place})"
                raise ConfigError(
                    f"{path} lies on {by_dev[dev]}{below}, which is frozen for each point",
                    hint="move it to a disk that is not protected",
                )
            place = _loop_image(dev)


def _dev_of(path: str) -> str:
    """The "major:minor" by which mountinfo knows the file system that holds ``path``."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}") as info:
            found = re.search(r"^mnt_id:\s*(\d+)$", info.read(), re.MULTILINE)
    finally:
        os.close(fd)
    assert found
    with open(MOUNTINFO, errors="surrogateescape") as file:
        mounts = parse_mountinfo(file.read())
    return next((mount.dev for mount in mounts if mount.mount_id == int(found[1])), "")


def _loop_image(dev: str) -> str | None:
    """The image behind a loop device or a partition of one."""
    for folder in (f"/sys/dev/block/{dev}", f"/sys/dev/block/{dev}/.."):
        with contextlib.suppress(OSError), open(f"{folder}/loop/backing_file") as file:
            return file.read().rstrip("\n").removesuffix(" (deleted)")
    return None
