"""A web server's disk: pages replaced whole, counters rewritten in place, a log appended.

Each step ends in fsync. Whatever moment a copy of the disk stands for, every page in it is whole
(its first line is the digest of the rest) and the log's numbers have no gap: ``check_pages``.
"""

import itertools
import os
import random
from dataclasses import dataclass

import xxhash

from replication.errors import IntegrityError
from vsphere_emu.workload.pace import Pace

PAGES_MAX = 1000
PAGE_BYTES_MIN, PAGE_BYTES_MAX = 256, 32 * 1024
COUNTERS, COUNTER_BYTES = 1024, 4096
LOG_BYTES_MAX = 8 << 20
DIGEST_CHARACTERS = 32


@dataclass(frozen=True, slots=True)
class PagesReport:
    """What ``check_pages`` found whole."""

    pages: int
    log_lines: int


class Web:
    """The workload on the file system mounted at ``folder``."""

    def __init__(self, folder: str) -> None:
        self._pages = os.path.join(folder, "pages")
        self._counters = os.path.join(folder, "counters.bin")
        self._log = os.path.join(folder, "access.log")
        self._random = random.Random(0)  # noqa: S311 - variety, not secrecy
        os.makedirs(self._pages, exist_ok=True)
        self._sequence = _last_number(self._log)
        self._text = b"<p>All the world's a stage, and all the men and women merely players.</p>\n"

    def run(self, pace: Pace) -> None:
        """Work until ``pace`` ends."""
        actions = (self._replace_page, self._rewrite_counter, self._append_log)
        while pace.next():
            self._random.choices(actions, weights=(6, 2, 2))[0]()

    def _replace_page(self) -> None:
        size = self._random.randint(PAGE_BYTES_MIN, PAGE_BYTES_MAX)
        body = self._text * (size // (2 * len(self._text))) + self._random.randbytes(size // 2)
        name = os.path.join(self._pages, f"{self._random.randrange(PAGES_MAX):04}.html")
        with open(f"{name}.new", "wb") as file:
            file.write(xxhash.xxh3_128_hexdigest(body).encode() + b"\n" + body)
            file.flush()
            os.fsync(file.fileno())
        os.rename(f"{name}.new", name)
        fd = os.open(self._pages, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _rewrite_counter(self) -> None:
        fd = os.open(self._counters, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            offset = self._random.randrange(COUNTERS) * COUNTER_BYTES
            os.pwrite(fd, self._random.randbytes(COUNTER_BYTES), offset)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _append_log(self) -> None:
        if os.path.exists(self._log) and os.path.getsize(self._log) > LOG_BYTES_MAX:
            os.rename(self._log, f"{self._log}.1")
        self._sequence += 1
        with open(self._log, "ab") as file:
            file.write(b"%d GET /%04d.html 200\n" % (self._sequence, self._sequence % PAGES_MAX))
            file.flush()
            os.fsync(file.fileno())


def check_pages(folder: str) -> PagesReport:
    """Check the disk mounted at ``folder``. Raises IntegrityError naming what is not whole."""
    pages = os.path.join(folder, "pages")
    names = [name for name in sorted(os.listdir(pages)) if name.endswith(".html")]
    for name in names:
        with open(os.path.join(pages, name), "rb") as file:
            digest, _, body = file.read().partition(b"\n")
        if digest.decode(errors="replace") != xxhash.xxh3_128_hexdigest(body):
            raise IntegrityError(f"pages/{name} is torn: its content is not what its digest says")
    numbers = _log_numbers(os.path.join(folder, "access.log"))
    for before, after in itertools.pairwise(numbers):
        if after != before + 1:
            raise IntegrityError(f"access.log goes from line {before} to {after}")
    return PagesReport(pages=len(names), log_lines=len(numbers))


def _log_numbers(path: str) -> list[int]:
    """The numbers of the log's whole lines; the last line may be half written."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        whole = file.read().split(b"\n")[:-1]
    try:
        return [int(line.split(b" ", 1)[0]) for line in whole]
    except ValueError as error:
        raise IntegrityError(f"access.log holds a line without a number: {error}") from error


def _last_number(path: str) -> int:
    numbers = _log_numbers(path)
    if os.path.exists(path):
        with open(path, "rb+") as file:  # a half line would run into the next one
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
    return numbers[-1] if numbers else 0
