"""What root's commands write into a daemon's folder is the daemon's user's."""

import os
import subprocess
import sys
from pathlib import Path

DAEMON = 65534
WRITE = """
import sys
from daemon.ownership import act_as_owner

act_as_owner(sys.argv[1])
open(sys.argv[2], "w").close()
"""


def written(folder: Path, acting_for: Path) -> os.stat_result:
    file = folder / "file"
    subprocess.run([sys.executable, "-c", WRITE, acting_for, file], check=True)
    return file.stat()


def open_to_all(folder: Path) -> None:
    """Folders of pytest are root's alone."""
    for path in (folder, *folder.parents[:3]):
        path.chmod(0o755)


def test_a_command_of_root_writes_as_whose_the_folder_is(tmp_path: Path) -> None:
    open_to_all(tmp_path)
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, DAEMON, DAEMON)
    found = written(state, state)
    assert (found.st_uid, found.st_gid) == (DAEMON, DAEMON)


def test_of_a_folder_that_is_not_there_its_parent_counts(tmp_path: Path) -> None:
    open_to_all(tmp_path)
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, DAEMON, DAEMON)
    assert written(state, state / "identity" / "more").st_uid == DAEMON


def test_what_is_roots_stays_roots(tmp_path: Path) -> None:
    assert written(tmp_path, tmp_path / "not there yet").st_uid == 0
