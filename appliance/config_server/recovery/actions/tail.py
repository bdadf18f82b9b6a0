"""The end of an output, however long the output is."""

from collections import deque

TAIL_BYTES_MAX = 64 << 10


class Tail:
    """Takes bytes, keeps the last TAIL_BYTES_MAX of them and how many there were."""

    def __init__(self, size_max: int = TAIL_BYTES_MAX) -> None:
        self._size_max = size_max
        self._parts: deque[bytes] = deque()
        self._kept = 0
        self.taken = 0

    def take(self, part: bytes) -> None:
        self.taken += len(part)
        self._parts.append(part[-self._size_max :])
        self._kept += len(self._parts[-1])
        while self._kept - len(self._parts[0]) >= self._size_max:
            self._kept -= len(self._parts.popleft())

    def text(self) -> str:
        """As text; NUL, which no column takes, and what is not UTF-8 as a replacement mark."""
        whole = b"".join(self._parts)[-self._size_max :]
        told = whole.decode(errors="replace").replace("\0", "\ufffd")
        left_out = self.taken - len(whole)
        return f"({left_out} bytes before this are left out)\n{told}" if left_out else told
