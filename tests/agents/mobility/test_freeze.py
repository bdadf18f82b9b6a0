"""Freezing real file systems. A leftover freeze hangs the machine: fixtures thaw at their end."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agents.mobility import freeze, freezer
from agents.mobility.freeze import Freezer, refuse_own, sync_file_systems, thaw_all
from agents.mobility.mounts import MountedFileSystem
from replication.errors import CaptureError, ConfigError, StorageError

KINDS = ("ext4", "xfs", "btrfs")
SIZES_MIB = {"ext4": 32, "xfs": 320, "btrfs": 128}
LONG = 30.0
"""A time limit that no test reaches."""


@dataclass
class Mount:
    """A file system on a loop device of its own."""

    kind: str
    point: str
    loop: str

    def described(self) -> MountedFileSystem:
        dev = next(
            line.split()[2]
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if line.split()[4] == self.point
        )
        return MountedFileSystem(self.point, self.kind, self.loop, dev, read_only=False)


class Writer:
    """A thread that writes and syncs once; a daemon, as a frozen one cannot be ended."""

    def __init__(self, point: str) -> None:
        self.done = threading.Event()
        self._path = os.path.join(point, f"written-{time.monotonic_ns()}")
        threading.Thread(target=self._write, daemon=True).start()

    def _write(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT)
        os.write(fd, b"x" * 10_000)
        os.fsync(fd)
        os.close(fd)
        self.done.set()


def thaw(point: str) -> None:
    fd = os.open(point, os.O_RDONLY)
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, freezer.FITHAW, 0)
    os.close(fd)


def is_frozen(point: str) -> bool:
    """Whether a write is still waiting after a while."""
    return not Writer(point).done.wait(0.3)


@pytest.fixture
def make_mount(tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    with contextlib.ExitStack() as made:

        def make(kind: str, folder: Path = tmp_path) -> Mount:
            name = f"{kind}-{time.monotonic_ns()}"
            image, point = folder / f"{name}.img", tmp_path / name
            point.mkdir()
            with open(image, "wb") as file:
                file.truncate(SIZES_MIB[kind] << 20)
            force = "-F" if kind == "ext4" else "-f"
            subprocess.run([f"mkfs.{kind}", "-q", force, str(image)], check=True)
            loop = subprocess.run(
                ["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True
            ).stdout.strip()
            made.callback(subprocess.run, ["losetup", "-d", loop], check=False)
            subprocess.run(["mount", "-t", kind, loop, str(point)], check=True)
            made.callback(unmount, str(point))
            return Mount(kind, str(point), loop)

        yield make


def unmount(point: str) -> None:
    for _ in range(100):
        thaw(point)
        if subprocess.run(["umount", point], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.05)
    subprocess.run(["umount", "-l", point], check=True)


@pytest.fixture(params=KINDS)
def mount(make_mount: Callable[..., Mount], request: pytest.FixtureRequest) -> Mount:
    return make_mount(request.param)


@pytest.fixture
def ext4(make_mount: Callable[..., Mount]) -> Mount:
    return make_mount("ext4")


@pytest.fixture
def holder(make_mount: Callable[..., Mount]) -> Iterator[Freezer]:
    with Freezer() as made:
        yield made


def test_frozen_file_system_blocks_writers_until_it_is_thawed(
    mount: Mount, holder: Freezer
) -> None:
    sync_file_systems([mount.point])
    assert holder.freeze([mount.point], LONG).mount_points == (mount.point,)
    writer = Writer(mount.point)
    assert not writer.done.wait(0.3)
    result = holder.thaw()
    assert (result.held, result.reason) == (True, "")
    assert 0.3e9 < result.pause_ns < 5e9
    assert writer.done.wait(5)


def test_several_are_frozen_together_and_one_named_twice_once(
    make_mount: Callable[..., Mount], holder: Freezer
) -> None:
    points = [make_mount(kind).point for kind in ("ext4", "xfs")]
    for _ in range(3):
        holder.freeze([*points, points[0]], LONG)
        writers = [Writer(point) for point in points]
        time.sleep(0.1)
        assert not any(writer.done.is_set() for writer in writers)
        assert holder.thaw().held
        assert all(writer.done.wait(5) for writer in writers)


def test_time_limit_thaws_though_the_agent_is_stuck(mount: Mount, holder: Freezer) -> None:
    holder.freeze([mount.point], 0.4)
    started = time.monotonic()
    writer = Writer(mount.point)
    assert writer.done.wait(5)
    assert 0.1 < time.monotonic() - started < 1.0
    result = holder.thaw()
    assert not result.held
    assert "time limit" in result.reason
    holder.freeze([mount.point], LONG)
    assert holder.thaw().held


AGENT = """
import sys, time
from agents.mobility.freeze import Freezer
with Freezer() as holder:
    holder.freeze([sys.argv[1]], 30)
    print(holder.pid, flush=True)
    time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_agent_killed_while_frozen_is_thawed_within_a_second(ext4: Mount, signum: int) -> None:
    command = [sys.executable, "-c", AGENT, ext4.point]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout
        pid = int(agent.stdout.readline())
        writer = Writer(ext4.point)
        assert not writer.done.wait(0.2)
        agent.send_signal(signum)
        assert writer.done.wait(1)
    deadline = time.monotonic() + 5
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_freezer_killed_while_frozen_is_told_and_thawed(mount: Mount, holder: Freezer) -> None:
    holder.freeze([mount.point], LONG)
    assert holder.pid
    os.kill(holder.pid, signal.SIGKILL)
    assert is_frozen(mount.point)
    result = holder.thaw()
    assert not result.held
    assert "gone" in result.reason
    assert not is_frozen(mount.point)
    holder.freeze([mount.point], LONG)
    assert holder.thaw().held


def test_what_was_left_frozen_is_thawed_at_the_start(mount: Mount, holder: Freezer) -> None:
    fd = os.open(mount.point, os.O_RDONLY)
    fcntl.ioctl(fd, freezer.FIFREEZE, 0)
    os.close(fd)
    writer = Writer(mount.point)
    assert not writer.done.wait(0.2)
    assert thaw_all([mount.point, "/proc", "/gone", mount.point]) == [mount.point]
    assert writer.done.wait(5)
    assert thaw_all([mount.point]) == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_agent_thaws_late_when_the_freezer_cannot(
    ext4: Mount, holder: Freezer, signum: int
) -> None:
    holder.freeze([ext4.point], 0.2)
    pid = holder.pid
    assert pid
    os.kill(pid, signum)
    try:
        assert Writer(ext4.point).done.wait(3)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert not holder.thaw().held


def test_freezer_thaws_and_ends_on_sigterm(ext4: Mount, holder: Freezer) -> None:
    holder.freeze([ext4.point], LONG)
    writer = Writer(ext4.point)
    assert not writer.done.wait(0.2)
    assert holder.pid
    os.kill(holder.pid, signal.SIGTERM)
    assert writer.done.wait(1)
    assert not holder.thaw().held


def test_look_changes_nothing_and_tells_of_a_thaw(mount: Mount, holder: Freezer) -> None:
    holder.freeze([mount.point], LONG, freezing_seconds_max=LONG)
    assert holder.look() == holder.look() == ""
    writer = Writer(mount.point)
    thaw(mount.point)
    assert writer.done.wait(5)
    assert holder.look() == f"{mount.point}: someone else thawed it"
    assert holder.look() == f"{mount.point}: someone else thawed it"
    result = holder.thaw()
    assert (result.held, result.reason) == (False, f"{mount.point}: someone else thawed it")
    assert Writer(mount.point).done.wait(5)
    holder.freeze([mount.point], 0.1, freezing_seconds_max=LONG)
    assert Writer(mount.point).done.wait(5)
    assert "the time limit passed" in holder.look()
    holder.thaw()
    holder.freeze([mount.point], LONG)
    assert holder.pid
    os.kill(holder.pid, signal.SIGKILL)
    assert "is gone" in holder.look()
    assert not holder.thaw().held
    assert Writer(mount.point).done.wait(5)


def test_an_answer_to_a_look_that_comes_late_is_none_to_the_thaw(
    ext4: Mount, holder: Freezer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freeze, "REPLY_SECONDS_MAX", 0.2)
    holder.freeze([ext4.point], LONG)
    pid = holder.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    assert "does not answer" in holder.look()
    threading.Timer(0.1, os.kill, (pid, signal.SIGCONT)).start()
    assert not holder.thaw().held
    assert Writer(ext4.point).done.wait(5)


def test_thaw_by_someone_else_is_told(ext4: Mount, holder: Freezer) -> None:
    holder.freeze([ext4.point], LONG)
    thaw(ext4.point)
    result = holder.thaw()
    assert not result.held
    assert "someone else" in result.reason


@pytest.mark.parametrize("other", ["/proc", "/dev/shm", "/gone", "/etc"])
def test_one_that_cannot_be_frozen_leaves_none_frozen(
    ext4: Mount, holder: Freezer, other: str
) -> None:
    with pytest.raises(CaptureError, match=other):
        holder.freeze([ext4.point, other], LONG)
    assert not is_frozen(ext4.point)
    holder.freeze([ext4.point], LONG)
    assert holder.thaw().held


def test_one_that_is_frozen_by_someone_else_is_left_to_him(
    make_mount: Callable[..., Mount], holder: Freezer
) -> None:
    ours, his = make_mount("ext4"), make_mount("ext4")
    fd = os.open(his.point, os.O_RDONLY)
    fcntl.ioctl(fd, freezer.FIFREEZE, 0)
    os.close(fd)
    with pytest.raises(CaptureError, match="frozen already"):
        holder.freeze([ours.point, his.point], LONG)
    assert not is_frozen(ours.point)
    assert thaw_all([his.point]) == [his.point]


def test_place_that_is_no_mount_point_any_more_freezes_nothing_below(
    ext4: Mount, holder: Freezer
) -> None:
    folder = os.path.join(ext4.point, "unmounted")
    os.mkdir(folder)
    with pytest.raises(CaptureError, match="nothing is mounted"):
        holder.freeze([folder], LONG)
    assert not is_frozen(ext4.point)


def test_freeze_that_blocks_keeps_no_other_frozen_and_is_undone_when_it_is_through(
    make_mount: Callable[..., Mount], holder: Freezer
) -> None:
    """The image of ``blocked`` lies on a frozen file system: its own freeze cannot finish."""
    host, free = make_mount("ext4"), make_mount("ext4")
    blocked = make_mount("ext4", Path(host.point))
    Path(blocked.point, "dirty").write_bytes(os.urandom(1 << 20))
    fd = os.open(host.point, os.O_RDONLY)
    fcntl.ioctl(fd, freezer.FIFREEZE, 0)
    os.close(fd)
    try:
        started = time.monotonic()
        with pytest.raises(CaptureError, match="not frozen within") as caught:
            holder.freeze([free.point, blocked.point], 0.5)
        assert time.monotonic() - started < 2
        assert blocked.point in str(caught.value)
        assert f"{free.point}:" not in str(caught.value) or "time limit" in str(caught.value)
        assert not is_frozen(free.point)
        with pytest.raises(CaptureError, match="earlier freeze"):
            holder.freeze([free.point, blocked.point], 0.5)
        holder.freeze([free.point], LONG)
        assert holder.thaw().held
    finally:
        thaw(host.point)
    assert Writer(blocked.point).done.wait(5)


def test_freezer_is_small_quick_and_locked(holder: Freezer) -> None:
    started = time.monotonic()
    with Freezer() as another:
        assert time.monotonic() - started < 2
        status = Path(f"/proc/{another.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        assert int(fields["VmLck"].split()[0]) > 0
        assert int(fields["VmRSS"].split()[0]) < 64 << 10
        pid = another.pid
    assert pid
    assert not is_alive(pid)


def test_sync_writes_out_and_names_what_it_cannot(mount: Mount) -> None:
    path = Path(mount.point, "dirty")
    path.write_bytes(os.urandom(4 << 20))
    sync_file_systems([mount.point, mount.point])
    sectors = Path("/sys/block", os.path.basename(mount.loop), "stat").read_text().split()[6]
    assert int(sectors) * 512 >= 4 << 20
    with pytest.raises(StorageError, match="/gone"):
        sync_file_systems(["/gone"])
    sync_file_systems([])


def test_file_system_with_the_agents_own_files_is_refused(
    mount: Mount, make_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    found = [mount.described()]
    refuse_own(found, [str(tmp_path), sys.executable, os.getcwd()])
    inside = Path(mount.point, "state")
    inside.mkdir()
    (tmp_path / "link").symlink_to(inside)
    for own in (inside, inside / "not" / "there" / "yet", tmp_path / "link" / "log"):
        with pytest.raises(ConfigError, match="lies on") as caught:
            refuse_own(found, [str(tmp_path), str(own)])
        assert mount.point in str(caught.value)


def test_image_on_a_file_system_to_be_frozen_is_followed(
    make_mount: Callable[..., Mount],
) -> None:
    host = make_mount("ext4")
    above = make_mount("ext4", Path(host.point))
    with pytest.raises(ConfigError, match="by way of"):
        refuse_own([host.described()], [os.path.join(above.point, "log")])
    refuse_own([above.described()], [host.point])


EXPEDITED = Path("/sys/kernel/rcu_expedited")


def test_kernel_hurries_only_while_it_freezes(ext4: Mount, holder: Freezer) -> None:
    seen = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.add(EXPEDITED.read_text().strip())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(5):
            holder.freeze([ext4.point], 10)
            assert EXPEDITED.read_text().strip() == "0"
            assert holder.thaw().held
    finally:
        done.set()
        watcher.join()
    assert seen == {"0", str(int(freezer.OUR_MARK))}


def test_haste_of_a_killed_freezer_ends_with_the_next(ext4: Mount) -> None:
    EXPEDITED.write_bytes(freezer.OUR_MARK)
    with Freezer() as holder:
        assert EXPEDITED.read_text().strip() == "0"
        EXPEDITED.write_text("1")  # an administrator's: it stays
        try:
            holder.freeze([ext4.point], 10)
            holder.thaw()
            assert EXPEDITED.read_text().strip() == "1"
        finally:
            EXPEDITED.write_text("0")
