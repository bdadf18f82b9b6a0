import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.durable import make_folder, storage_error, write_whole
from replication.errors import StorageError

# Writes a file and dies just before (or just after) the call to the system of the given number.
VICTIM = """
import os, signal, sys
calls, fatal, after = 0, int(sys.argv[2]), sys.argv[3] == "after"
def mortal(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == fatal and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
from daemon.durable import write_whole
for name in ("open", "close", "fsync", "rename"):
    setattr(os, name, mortal(getattr(os, name)))
write_whole(sys.argv[1], [b"new " * 5000, b"content"])
print(calls)
"""
OLD, NEW = b"old content", b"new " * 5000 + b"content"


def run_victim(path: Path, call: int, when: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", VICTIM, str(path), str(call), when],
        capture_output=True,
        text=True,
        check=False,
    )


def test_killed_writer_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(OLD)
    survived = run_victim(path, 0, "before")
    assert (survived.returncode, path.read_bytes()) == (0, NEW)
    call_count = int(survived.stdout)
    assert call_count >= 6  # open, fsync, close, rename; open, fsync, close of the folder
    seen = set()
    for call in range(1, call_count + 1):
        for when in ("before", "after"):
            path.write_bytes(OLD)
            assert run_victim(path, call, when).returncode == -signal.SIGKILL
            assert path.read_bytes() in (OLD, NEW)
            seen.add(path.read_bytes())
    assert seen == {OLD, NEW}


def test_file_and_folder_are_synced_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = tmp_path / "state", []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        real_fsync(fd)
        told.append(os.readlink(f"/proc/self/fd/{fd}"))

    def rename(source: str, target: str) -> None:
        told.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write_whole(str(path), b"x")
    assert told[0].startswith(f"{path}.")
    assert told[1:] == ["rename", str(tmp_path)]


def test_mode_is_private_unless_said_otherwise(tmp_path: Path) -> None:
    write_whole(str(tmp_path / "key"), b"x")
    write_whole(str(tmp_path / "told"), [b"x"], mode=0o644)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "told").stat().st_mode & 0o777 == 0o644


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_leaves_the_old_content_and_no_litter(small_disk: Path) -> None:
    path = small_disk / "state"
    write_whole(str(path), OLD)
    with pytest.raises(StorageError, match="free space") as caught:
        write_whole(str(path), bytes(1 << 20))
    assert caught.value.retryable
    assert path.read_bytes() == OLD
    assert os.listdir(small_disk) == ["state"]


def test_folders_are_made_whole_and_again(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    for _ in range(2):
        make_folder(str(deep))
        assert deep.is_dir()
    assert deep.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot create"):
        make_folder(str(tmp_path / "file" / "below"))


def test_missing_folder_is_told_with_the_path(tmp_path: Path) -> None:
    path = str(tmp_path / "gone" / "state")
    with pytest.raises(StorageError, match="gone/state"):
        write_whole(path, b"x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_refusals_of_the_system_have_a_hint(number: int) -> None:
    assert storage_error("write", "/x", OSError(number, os.strerror(number))).hint
