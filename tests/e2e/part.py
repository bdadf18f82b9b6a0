"""A daemon as a process of its own, started, stopped and killed by a test."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tests.preloaded import Forked, start_daemon

ROOT = Path(__file__).parents[2]
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0
TAIL_CHARS_MAX = 3000


def to_toml(tree: Mapping[str, Any]) -> str:
    """A configuration file; what is None is left out.

    What JSON writes for a scalar or a list of scalars is TOML too.
    """
    return "\n".join(_lines(tree, ())) + "\n"


def _lines(tree: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = []
    tables: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) or (
            value and isinstance(value, list | tuple) and isinstance(value[0], Mapping)
        ):
            tables.append((key, value))
        elif value is not None:
            lines.append(f"{key} = {json.dumps(value)}")
    for key, value in tables:
        name = ".".join((*path, key))
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]", *_lines(value, (*path, key))]
        else:
            for item in value:
                lines += ["", f"[[{name}]]", *_lines(item, (*path, key))]
    return lines


def merged(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with what ``over`` says, tables merged key by key."""
    made = dict(tree)
    for key, value in over.items():
        known = made.get(key)
        made[key] = merged(known, value) if isinstance(known, Mapping) else value
    return made


class Part:
    """One daemon; ``start`` appends to its log, so that a log tells of all its lives.

    is_forked: start from code that is loaded already; else each starts as it does in earnest.
    """

    is_forked: ClassVar[bool] = False

    def __init__(self, name: str, module: str, folder: Path, health_port: int) -> None:
        self.name = name
        self.module = module
        self.config = folder / f"{name}.toml"
        self.log = folder / f"{name}.log"
        self.health_port = health_port
        self.is_wanted = False
        self._life_at = 0
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._groups: list[int] = []

    def configure(self, tree: Mapping[str, Any]) -> None:
        self.config.write_text(to_toml(tree))

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} is not running"
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def is_ready(self) -> bool:
        """Whether this life of it has said that it is ready."""
        with self.log.open("rb") as log:
            log.seek(self._life_at)
            return b"] ready " in log.read()

    def start(self, *, wait: bool = True) -> None:
        assert not self.is_alive, f"{self.name} runs already"
        with self.log.open("ab") as log:
            self._life_at = log.seek(0, os.SEEK_END)
            arguments = ("--config", str(self.config))
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            if self.is_forked:
                self._process = start_daemon(
                    self.module,
                    *arguments,
                    log_fd=log.fileno(),
                    cwd=self.config.parent,
                    environment=environment,
                )
            else:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", self.module, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    cwd=self.config.parent,
                    env=environment,
                )
        self._groups.append(self._process.pid)
        self.is_wanted = True
        if wait:
            self.await_ready()

    def await_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while not self.is_ready:
            if not self.is_alive or time.monotonic() > deadline:
                raise AssertionError(f"{self.name} did not start:\n{self.tail()}")
            time.sleep(0.05)

    def run_to_end(self, seconds_max: float = 30.0) -> int:
        """Start it where it is expected to end by itself; its exit code."""
        self.start(wait=False)
        self.is_wanted = False
        assert self._process is not None
        return self._process.wait(seconds_max)

    def terminate(self) -> None:
        """SIGTERM, and no waiting."""
        assert self._process is not None, f"{self.name} is not running"
        self.is_wanted = False
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """SIGTERM if it has not ended; the exit code."""
        process = self._process
        assert process is not None, f"{self.name} is not running"
        if self.is_wanted:
            self.terminate()
        try:
            return process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not stop on SIGTERM:\n{self.tail()}") from None

    def kill(self) -> None:
        """SIGKILL it, as a power cut would; children must cope by themselves."""
        self.is_wanted = False
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def clean_up(self) -> None:
        """Leave nothing of any of its lives, children included."""
        self.kill()
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def health(self) -> dict[str, Any]:
        """The body of ``/healthz``; empty while it does not answer."""
        try:
            with urllib.request.urlopen(self._url("healthz"), timeout=5) as answer:
                body: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            body = json.load(error)
        except (OSError, ValueError):
            body = {}
        return body

    def metric(self, name: str, **labels: str) -> float:
        """Sum over a metric's samples that have these labels; 0 where there is none."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        with urllib.request.urlopen(self._url("metrics"), timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        samples = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        samples = [line for line in samples if all(label in line for label in wanted)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples)

    def resident_bytes(self) -> int:
        """Resident memory of the process itself. proc(5)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0

    def cpu_seconds(self) -> float:
        """Time on CPU of the process itself. proc(5)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def tail(self, chars_max: int = TAIL_CHARS_MAX) -> str:
        try:
            return self.log.read_text(errors="replace")[-chars_max:]
        except FileNotFoundError:
            return "(no log)"

    def _url(self, page: str) -> str:
        return f"http://127.0.0.1:{self.health_port}/{page}"
