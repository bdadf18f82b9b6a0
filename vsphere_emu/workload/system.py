"""The root file system of a machine that boots: the log of its service, and files beside it.

The service's log is written as the service in the bootable image does (``image/recipe.py``): it
goes on with the number after the last whole one when the machine is started at the second site.
The other files are as large as those that come and go on a running system.
"""

import itertools
import os
import random
import re
from dataclasses import dataclass

from replication.errors import IntegrityError
from vsphere_emu.image.recipe import LOG_BYTES_MAX, SERVICE_FOLDER
from vsphere_emu.workload.pace import Pace

FILES_MAX = 64
FILE_BYTES_MAX = 64 * 1024
TICKS_PER_FILE = 4
_TICK = re.compile(rb"(\d+) tick\n")


@dataclass(frozen=True, slots=True)
class LogReport:
    """What ``check_log`` found. last: the newest number, 0 for none; lines: how many there are."""

    last: int
    lines: int


class System:
    """The workload on the root file system mounted at ``root``."""

    def __init__(self, root: str) -> None:
        self._folder = os.path.join(root, SERVICE_FOLDER.lstrip("/"))
        self._log = os.path.join(self._folder, "log")
        self._random = random.Random(0)  # noqa: S311 - variety, not secrecy
        os.makedirs(self._folder, exist_ok=True)
        self._end_torn_line()
        self._last = check_log(root).last

    def run(self, pace: Pace) -> None:
        """Work until ``pace`` ends."""
        while pace.next():
            self._tick()
            if self._last % TICKS_PER_FILE == 0:
                self._replace_file()

    def _tick(self) -> None:
        if os.path.exists(self._log) and os.path.getsize(self._log) >= LOG_BYTES_MAX:
            os.rename(self._log, f"{self._log}.1")
        self._last += 1
        with open(self._log, "ab") as file:
            file.write(b"%d tick\n" % self._last)
            file.flush()
            os.fsync(file.fileno())

    def _replace_file(self) -> None:
        path = os.path.join(self._folder, f"state-{self._random.randrange(FILES_MAX):02}")
        with open(f"{path}.new", "wb") as file:
            file.write(self._random.randbytes(self._random.randint(1, FILE_BYTES_MAX)))
            file.flush()
            os.fsync(file.fileno())
        os.rename(f"{path}.new", path)

    def _end_torn_line(self) -> None:
        """What a power cut left of a last line would otherwise run into the next one."""
        if os.path.exists(self._log):
            with open(self._log, "rb+") as file:
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)


def check_log(root: str) -> LogReport:
    """Check the service's log. Raises IntegrityError when a number is missing."""
    folder = os.path.join(root, SERVICE_FOLDER.lstrip("/"))
    numbers: list[int] = []
    for name in ("log.1", "log"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            with open(path, "rb") as file:
                numbers += [
                    int(found[1])
                    for line in file.read().splitlines(keepends=True)
                    if (found := _TICK.fullmatch(line))
                ]
    for before, after in itertools.pairwise(numbers):
        if after != before + 1:
            raise IntegrityError(f"the service's log goes from number {before} to {after}")
    return LogReport(last=numbers[-1] if numbers else 0, lines=len(numbers))
