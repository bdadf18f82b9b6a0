"""Scripts that bring applications to rest before a point and let them go on after it.

Each runs in a process group of its own, with a time limit and bounded output. What it leaves behind
in that group is killed when it ends; what shall live on starts a session of its own (setsid).

That post scripts are due is on disk before the first pre script runs: should the agent be killed in
between, ``run_post_if_due`` makes up for them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from daemon.durable import storage_error, sync_folder, write_whole
from replication.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

OUTPUT_TAIL_BYTES = 64 << 10
TERM_SECONDS = 2.0
"""Between asking a script to end and killing it."""

LINE_CHARS_MAX = 200

DUE_FILE = "post.due"


@dataclass(frozen=True, slots=True)
class ScriptReport:
    """Whether all scripts did their work; ``reason`` says which one did not, and why."""

    ok: bool
    reason: str = ""


def check_scripts(scripts: Sequence[str]) -> None:
    """Raise ConfigError for a script that cannot run or that others could have written.

    The agent runs as root: whoever can write to a script, or put another in its place, is root.
    """
    for script in scripts:
        _check(script)


def run_pre(scripts: Sequence[str], seconds_max: float) -> ScriptReport:
    """Run the scripts in turn, each for at most ``seconds_max``, until one fails."""
    for script in scripts:
        reason = _run(script, seconds_max)
        if reason:
            return ScriptReport(ok=False, reason=reason)
    return ScriptReport(ok=True)


def run_post(scripts: Sequence[str], seconds_max: float) -> ScriptReport:
    """Run all scripts in turn, whatever becomes of the ones before."""
    reasons = [reason for script in scripts if (reason := _run(script, seconds_max))]
    return ScriptReport(ok=not reasons, reason="; ".join(reasons))


def set_post_due(folder: str) -> None:
    """Post scripts are due from now on, durably; the agent's state lies in ``folder``."""
    write_whole(os.path.join(folder, DUE_FILE), b"")


def is_post_due(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, DUE_FILE))


def clear_post_due(folder: str) -> None:
    """The post scripts have run; fine if none were due."""
    path = os.path.join(folder, DUE_FILE)
    try:
        os.unlink(path)
        sync_folder(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error("delete", path, error) from error


def run_post_if_due(folder: str, scripts: Sequence[str], seconds_max: float) -> ScriptReport | None:
    """Run the post scripts that an agent which was killed owes; None when none are due.

    Killed in turn, it leaves them due: so they may run twice.
    """
    if not is_post_due(folder):
        return None
    report = run_post(scripts, seconds_max)
    clear_post_due(folder)
    return report


def _check(script: str) -> None:
    if not os.path.isabs(script):
        raise ConfigError(f"the script {script!r} is not named by an absolute path")
    try:
        found = os.stat(script)
    except OSError as error:
        raise ConfigError(f"cannot use the script {script}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode) or not os.access(script, os.X_OK):
        raise ConfigError(f"the script {script} is not executable", hint="chmod 755")
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise ConfigError(
            f"the script {script} can be written by others than its owner and root",
            hint="chown root, chmod 755",
        )
    _check_path(script, script)
    _check_path(script, os.path.realpath(script))


def _check_path(script: str, path: str) -> None:
    """Raise ConfigError where somebody could put something else in the place of ``path``."""
    trusted = (0, os.geteuid())
    if os.lstat(path).st_uid not in trusted:  # a link: in an open folder its owner can replace it
        raise ConfigError(f"others can replace the script {script}: they own the link {path}")
    while path != "/":
        path = os.path.dirname(path)
        found = os.stat(path)
        open_to = 0o022 if found.st_gid else 0o002
        is_open = found.st_mode & open_to and not found.st_mode & stat.S_ISVTX
        if found.st_uid not in trusted or is_open or os.lstat(path).st_uid not in trusted:
            raise ConfigError(
                f"others can replace the script {script}: {path} is theirs or open to them",
                hint="keep scripts where root alone can write, as /etc/understudy",
            )


def _run(script: str, seconds_max: float) -> str:
    """Why the script did not do its work; empty if it did."""
    try:
        _check(script)
        process = subprocess.Popen(
            [script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
        )
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"{script} did not start: {error.strerror}"
    with process:
        watched = _Watched(process)
        try:
            in_time = watched.wait(seconds_max)
            if not in_time:
                os.killpg(process.pid, signal.SIGTERM)
                watched.wait(TERM_SECONDS)
        finally:
            # Before it is reaped: until then the number is the group's and nobody else's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            line = watched.close()
    said = f": {line}" if line else ""
    if not in_time:
        return f"{script} did not end within {seconds_max:g} s{said}"
    if process.returncode < 0:
        return f"{script} was ended by signal {-process.returncode}{said}"
    return f"{script} ended with exit code {process.returncode}{said}" if process.returncode else ""


class _Watched:
    """A running script and the last of what it said."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        self._output = process.stdout.fileno()
        os.set_blocking(self._output, False)
        self._ended = os.pidfd_open(process.pid)
        self._poller = select.poll()
        self._poller.register(self._output, select.POLLIN)
        self._poller.register(self._ended, select.POLLIN)
        self._tail = b""

    def wait(self, seconds: float) -> bool:
        """Whether it ended in time; children that hold its output open are not waited for."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready = {fd for fd, _ in self._poller.poll(int(left * 1000) + 1)}
            if self._output in ready:
                self._read()
            if self._ended in ready:
                return True
        return False

    def close(self) -> str:
        """The last line that it said, printable."""
        self._read()
        os.close(self._ended)
        lines = self._tail.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        last = "".join(char if char.isprintable() else "?" for char in last)
        return last if len(last) <= LINE_CHARS_MAX else f"{last[:LINE_CHARS_MAX]}…"

    def _read(self) -> None:
        # One piece at a time: a script that never stops talking must not keep the clock from us.
        try:
            piece = os.read(self._output, OUTPUT_TAIL_BYTES)
        except BlockingIOError:
            return
        if not piece:
            with contextlib.suppress(KeyError):
                self._poller.unregister(self._output)
        self._tail = (self._tail + piece)[-OUTPUT_TAIL_BYTES:]
