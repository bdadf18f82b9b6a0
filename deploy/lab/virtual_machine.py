"""A virtual machine in qemu, for a machine whose own kernel runs the agent, and for its points.

Emulated processors (TCG) always: they work wherever qemu does. The machine reaches the host's
loopback ports at HOST_ADDRESS, through qemu's own network, which needs no privilege.
"""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.lab.stack import wait_for
from replication.errors import UnavailableError
from vsphere_emu.image.recipe import READY_MARKER, SERVICE_PORT
from vsphere_emu.workload.life import end_process

HOST_ADDRESS = "10.0.2.2"
MEMORY_MIB = 1024
CONSOLE_CHARACTERS_SHOWN = 800
ANSWER_SECONDS_MAX = 20.0
_STOP = ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))
_READY = re.compile(rf"{READY_MARKER} generation=(\d+) counter=(\d+)")
LOGIN = "login:"


@dataclass(frozen=True, slots=True)
class Drive:
    """A disk of the machine. throw_away: what the machine writes is forgotten with it."""

    path: str
    serial: str
    throw_away: bool = False


@dataclass(frozen=True, slots=True)
class VirtualMachine:
    """One machine; what it was started as is found again by its files in ``folder``.

    port: of the host's loopback, where the machine's service is asked.
    """

    folder: str
    name: str
    drives: tuple[Drive, ...]
    port: int
    uuid: str
    processors: int = 1

    @property
    def console_path(self) -> str:
        return os.path.join(self.folder, f"{self.name}.console")

    @property
    def _pid_path(self) -> str:
        return os.path.join(self.folder, f"{self.name}.pid")

    def pid(self) -> int | None:
        """The process; None if it does not run."""
        try:
            with open(self._pid_path, encoding="ascii") as file:
                pid = int(file.read())
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                is_ours = self._pid_path.encode() in file.read()
        except (OSError, ValueError):
            return None
        return pid if is_ours else None

    def start(self) -> None:
        """Switch it on if it is off."""
        if self.pid() is not None:
            return
        done = subprocess.run(
            self.command(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UnavailableError(
                f"{self.name} cannot be started: {done.stderr.strip()}", hint="make setup"
            )

    def command(self) -> Sequence[str]:
        """What starts it."""
        command = ["qemu-system-x86_64", "-daemonize", "-pidfile", self._pid_path]
        command += ["-nodefaults", "-no-reboot", "-display", "none", "-uuid", self.uuid]
        command += ["-serial", f"file:{self.console_path}", "-m", str(MEMORY_MIB)]
        command += ["-smp", str(self.processors), "-M", "pc,accel=tcg", "-cpu", "max,la57=off"]
        for drive in self.drives:
            snapshot = "on" if drive.throw_away else "off"
            command += [
                "-drive",
                f"file={drive.path},format=raw,if=none,id={drive.serial},snapshot={snapshot}",
                "-device",
                f"virtio-blk-pci,drive={drive.serial},serial={drive.serial}",
            ]
        forward = f"hostfwd=tcp:127.0.0.1:{self.port}-:{SERVICE_PORT}"
        command += ["-netdev", f"user,id=net,{forward}", "-device", "virtio-net-pci,netdev=net"]
        return command

    def stop(self) -> None:
        """Switch it off, as a power cut would; fine if it is off."""
        pid = self.pid()
        if pid is not None:
            end_process(pid, lambda: self.pid() == pid, _STOP)

    def console(self) -> str:
        """What it has said on its serial console."""
        try:
            with open(self.console_path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    def wait_ready(self, seconds_max: float) -> "Start":
        """Wait until its service and its login prompt are there."""
        self._wait_for("the service of", lambda: _READY.search(self.console()), seconds_max)
        self._wait_for("the login prompt of", lambda: LOGIN in self.console(), seconds_max)
        found = _READY.search(self.console())
        assert found
        return Start(generation=int(found[1]), counter=int(found[2]))

    def ask(self) -> "Answer":
        """What the service answers now. Raises UnavailableError when it does not."""
        deadline = time.monotonic() + ANSWER_SECONDS_MAX
        while True:
            try:
                url = f"http://127.0.0.1:{self.port}/"
                with urllib.request.urlopen(url, timeout=ANSWER_SECONDS_MAX) as answer:
                    tree = json.load(answer)
                return Answer(generation=tree["generation"], counter=tree["counter"])
            except (OSError, ValueError) as error:
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        f"the service of {self.name} does not answer: {error}",
                        hint=f"see {self.console_path}",
                    ) from error
                time.sleep(0.5)

    def _wait_for(self, what: str, holds: object, seconds_max: float) -> None:
        assert callable(holds)

        def is_so() -> bool:
            if self.pid() is None:
                raise UnavailableError(f"{self.name} is off: {self._tail()}")
            return bool(holds())

        try:
            wait_for(f"{what} {self.name}", is_so, seconds_max)
        except UnavailableError as error:
            raise UnavailableError(f"{error}: {self._tail()}", hint=self.console_path) from error

    def _tail(self) -> str:
        return self.console()[-CONSOLE_CHARACTERS_SHOWN:].strip() or "(its console is empty)"


@dataclass(frozen=True, slots=True)
class Start:
    """What a machine said when it was up: its how manieth start, and where its log ended."""

    generation: int
    counter: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a machine's service answers: its how manieth start, and how far its log is."""

    generation: int
    counter: int
