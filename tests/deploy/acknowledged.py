"""A client of a guest's database that knows which of its transactions were acknowledged to it."""

import subprocess
import threading
from types import TracebackType
from typing import Self

TABLE = "CREATE TABLE acknowledged (n bigint PRIMARY KEY);"


class AcknowledgedWriter:
    """Inserts 1, 2, 3 … each a transaction of its own, until its connection ends."""

    def __init__(self, socket_folder: str) -> None:
        self._session = subprocess.Popen(
            ["psql", "-X", "-q", "-A", "-t", "-h", socket_folder, "-U", "postgres", "postgres"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        self.last = 0
        self._thread = threading.Thread(target=self._write, daemon=True)

    def __enter__(self) -> Self:
        self._tell(TABLE)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.kill()
        self._session.wait()
        self._thread.join()

    def _tell(self, line: str) -> None:
        assert self._session.stdin is not None
        self._session.stdin.write(line + "\n")

    def _write(self) -> None:
        assert self._session.stdout is not None
        number = 0
        try:
            while True:
                number += 1
                self._tell(f"INSERT INTO acknowledged VALUES ({number}) RETURNING n;")
                if self._session.stdout.readline().strip() != str(number):
                    return
                self.last = number
        except (BrokenPipeError, ValueError):
            return
