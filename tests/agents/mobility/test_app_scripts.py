import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agents.mobility import app_scripts
from agents.mobility.app_scripts import (
    check_scripts,
    clear_post_due,
    is_post_due,
    run_post,
    run_post_if_due,
    run_pre,
    set_post_due,
)
from replication.errors import ConfigError

MakeScript = Callable[..., str]


@pytest.fixture
def script(tmp_path: Path) -> MakeScript:
    def make(body: str, name: str = "quiesce") -> str:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return make


def assert_all_end(pids: Path, count: int) -> None:
    """Those whose numbers a script wrote down; a kill takes a moment to be felt."""
    found = [int(pid) for pid in pids.read_text().split()]
    assert len(found) == count
    deadline = time.monotonic() + 5
    while any(is_alive(pid) for pid in found):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_all_scripts_run_in_turn(script: MakeScript, tmp_path: Path) -> None:
    log = tmp_path / "log"
    scripts = [script(f"echo {name} >> {log}", name) for name in ("first", "second")]
    assert run_pre(scripts, 5) == app_scripts.ScriptReport(ok=True)
    assert log.read_text() == "first\nsecond\n"
    assert run_pre([], 5).ok


def test_failure_names_script_code_and_last_line_and_ends_the_rest(
    script: MakeScript, tmp_path: Path
) -> None:
    bad = script("echo begin; echo 'table is locked' >&2; echo; exit 3", "bad")
    never = script(f"touch {tmp_path}/ran", "never")
    report = run_pre([bad, never], 5)
    assert not report.ok
    assert report.reason == f"{bad} ended with exit code 3: table is locked"
    assert not (tmp_path / "ran").exists()


def test_post_runs_all_even_after_failures(script: MakeScript, tmp_path: Path) -> None:
    bad, worse = script("exit 1", "bad"), script("kill -9 $$", "worse")
    good = script(f"touch {tmp_path}/ran", "good")
    report = run_post([bad, worse, str(tmp_path / "gone"), good], 5)
    assert not report.ok
    for told in ("exit code 1", "signal 9", "gone: No such file"):
        assert told in report.reason
    assert (tmp_path / "ran").exists()


def test_script_that_hangs_is_ended_with_its_children(script: MakeScript, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    hanging = script(f"sleep 100 & echo $! $$ > {pids}; echo waiting for the lock; wait")
    started = time.monotonic()
    report = run_pre([hanging], 0.3)
    assert time.monotonic() - started < 5
    assert report.reason == f"{hanging} did not end within 0.3 s: waiting for the lock"
    assert_all_end(pids, 2)


def test_script_that_is_deaf_to_sigterm_is_killed(
    script: MakeScript, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_scripts, "TERM_SECONDS", 0.3)
    pids = tmp_path / "pids"
    deaf = script(f"trap '' TERM; echo $$ > {pids}; while :; do sleep 0.1; done")
    started = time.monotonic()
    assert "did not end" in run_pre([deaf], 0.3).reason
    assert time.monotonic() - started < 5
    assert_all_end(pids, 1)


def test_script_may_tidy_up_when_its_time_is_over(script: MakeScript, tmp_path: Path) -> None:
    tidy = script(f"trap 'touch {tmp_path}/unlocked; exit 0' TERM; while :; do sleep 0.05; done")
    report = run_pre([tidy], 0.3)
    assert not report.ok
    assert "did not end" in report.reason
    assert (tmp_path / "unlocked").exists()


def test_children_left_behind_neither_hold_us_up_nor_live_on(
    script: MakeScript, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    body = f"for i in $(seq 30); do (sh -c 'sleep 100 & wait') & echo $! >> {pids}; done; exit 0"
    started = time.monotonic()
    assert run_pre([script(body)], 20).ok
    assert time.monotonic() - started < 5
    assert_all_end(pids, 30)


def test_loud_script_is_heard_to_its_last_line_in_bounded_memory(script: MakeScript) -> None:
    loud = script("head -c 20000000 /dev/zero | tr '\\0' x; echo; echo at last; exit 7")
    assert run_pre([loud], 20).reason == f"{loud} ended with exit code 7: at last"


def test_script_that_never_stops_talking_is_stopped(script: MakeScript) -> None:
    endless = script("yes understudy")
    started = time.monotonic()
    report = run_pre([endless], 0.3)
    assert time.monotonic() - started < 5
    assert report.reason.startswith(f"{endless} did not end within 0.3 s: ")


def test_last_line_is_short_and_printable(script: MakeScript) -> None:
    long = script("head -c 5000 /dev/zero | tr '\\0' y; printf '\\033[1m\\377'; exit 1")
    reason = run_pre([long], 5).reason
    assert len(reason) < len(long) + 250
    assert reason.isprintable()


@pytest.mark.parametrize("mode", [0o644, 0o775, 0o757])
def test_script_that_is_not_executable_or_open_to_others_is_refused(
    script: MakeScript, mode: int
) -> None:
    path = script("exit 0")
    check_scripts([path])
    os.chmod(path, mode)
    with pytest.raises(ConfigError, match=path):
        check_scripts([path])
    assert not run_pre([path], 5).ok


def test_script_of_another_user_or_in_an_open_folder_is_refused(
    script: MakeScript, tmp_path: Path
) -> None:
    path = script("exit 0")
    os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError, match="others"):
        check_scripts([path])
    os.chown(path, 0, 0)
    check_scripts([path])
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="open to them"):
        check_scripts([path])


def test_script_must_be_an_absolute_path_to_a_file(tmp_path: Path) -> None:
    for wrong in ("quiesce", "./quiesce", "", str(tmp_path), str(tmp_path / "gone")):
        with pytest.raises(ConfigError):
            check_scripts([wrong])


def test_what_is_no_program_is_told(script: MakeScript) -> None:
    path = script("exit 0")
    Path(path).write_bytes(b"\x7fELF rubbish")
    assert "did not start" in run_pre([path], 5).reason


def test_post_that_is_owed_runs_once_and_all_of_it(script: MakeScript, tmp_path: Path) -> None:
    folder = str(tmp_path)
    log = tmp_path / "log"
    posts = [script("exit 3", "bad"), script(f"echo ran >> {log}", "good")]
    assert run_post_if_due(folder, posts, 5) is None
    set_post_due(folder)
    assert is_post_due(folder)
    report = run_post_if_due(folder, posts, 5)
    assert report is not None
    assert "exit code 3" in report.reason
    assert log.read_text() == "ran\n"
    assert run_post_if_due(folder, posts, 5) is None
    clear_post_due(folder)
    assert log.read_text() == "ran\n"
