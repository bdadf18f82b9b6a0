"""Keeps the C heap from holding on to what segments needed in passing."""

import ctypes

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
MAPPED_BYTES_MIN = 2 << 20
ARENAS_MAX = 2


def bound_heap() -> None:
    """Give large buffers back to the system when they are freed. Source: mallopt(3).

    Left alone, glibc raises its threshold to the largest buffer that was freed, and gives each
    disk thread an arena: tens of MiB stay resident for good. Does nothing on other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES_MIN)
        mallopt(_M_ARENA_MAX, ARENAS_MAX)
