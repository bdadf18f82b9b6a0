"""One process at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.folder_lock import FolderLock
from replication.errors import ConfigError, StorageError

HOLD = """
import sys, signal
from daemon.folder_lock import FolderLock
from replication.errors import ConfigError
lock = FolderLock(sys.argv[1], ConfigError("taken"))
print("held", flush=True)
signal.pause()
"""


def test_second_holder_is_told_in_the_callers_words_until_the_first_lets_go(tmp_path: Path) -> None:
    with (
        FolderLock(str(tmp_path), ConfigError("mine")) as lock,
        pytest.raises(ConfigError, match="another agent runs") as told,
    ):
        FolderLock(str(tmp_path), ConfigError("another agent runs", hint="stop it"))
    assert told.value.hint == "stop it"
    lock.close()
    FolderLock(str(tmp_path), ConfigError("another agent runs")).close()


def test_locks_of_other_names_are_other_locks(tmp_path: Path) -> None:
    with (
        FolderLock(str(tmp_path), ConfigError("a")),
        FolderLock(str(tmp_path), ConfigError("b"), name="agent.lock") as other,
    ):
        assert os.path.basename(other.path) == "agent.lock"


def test_killed_holder_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "held\n"
            with pytest.raises(ConfigError):
                FolderLock(str(tmp_path), ConfigError("taken"))
            process.send_signal(signal.SIGKILL)
            process.wait(10)
            FolderLock(str(tmp_path), ConfigError("taken")).close()
        finally:
            process.kill()


def test_folder_that_is_not_there_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone"):
        FolderLock(str(tmp_path / "gone"), ConfigError("taken"))
