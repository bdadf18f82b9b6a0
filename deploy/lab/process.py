"""The lab's daemons as background processes: a pid file and a log each.

A pid file names the process and its start time, so that a number which the kernel has given to
another process since is never signalled.
"""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from deploy.lab.layout import Layout
from replication.errors import UnavailableError

STOP_SECONDS_MAX = 12.0
START_SECONDS_MAX = 40.0


@dataclass(frozen=True, slots=True)
class Background:
    """One daemon of the lab."""

    layout: Layout
    name: str
    module: str
    config: str
    health_port: int | None = None
    arguments: tuple[str, ...] = ()

    @property
    def log_path(self) -> str:
        return self.layout.path("log", f"{self.name}.log")

    @property
    def _pid_path(self) -> str:
        return self.layout.path("run", f"{self.name}.pid")

    def pid(self) -> int | None:
        """The running process's id; None if it does not run."""
        try:
            with open(self._pid_path, encoding="ascii") as file:
                pid, started = file.read().split()
        except (OSError, ValueError):
            return None
        return int(pid) if _start_time(int(pid)) == started else None

    def start(self) -> None:
        """Start it if it does not run; its output is appended to the log."""
        if self.pid() is not None:
            return
        with open(self.log_path, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", self.module, "--config", self.config, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.layout.root,
                env={**os.environ, "PYTHONPATH": _source_folder()},
            )
        with open(self._pid_path, "w", encoding="ascii") as file:
            file.write(f"{process.pid} {_start_time(process.pid)}")

    def wait_ready(self) -> None:
        """Return when its health port answers; UnavailableError with the log's end otherwise."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            if self.pid() is None:
                break
            if self.health_port is None or _answers(self.health_port):
                return
            time.sleep(0.1)
        raise UnavailableError(
            f"{self.name} did not start: {self.log_tail()}", hint=f"see {self.log_path}"
        )

    def log_tail(self, chars_max: int = 600) -> str:
        try:
            with open(self.log_path, encoding="utf-8", errors="replace") as file:
                return file.read()[-chars_max:].strip()
        except OSError:
            return "no log"

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    def ask_to_stop(self) -> None:
        """SIGTERM; fine if it is gone."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)

    def wait_stopped(self) -> None:
        """Wait until it is gone; SIGKILL for one that does not drain in time."""
        deadline = time.monotonic() + STOP_SECONDS_MAX
        while self.pid() is not None:
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.05)
        if os.path.exists(self._pid_path):
            os.unlink(self._pid_path)


def _source_folder() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _start_time(pid: int) -> str | None:
    """Clock ticks since boot at which the process began; None for a dead one. proc(5)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
