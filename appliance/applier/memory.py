"""Keeps the C library from holding on to what the daemon has freed.

By its defaults glibc raises the size from which it gives memory back at once after each segment
that was freed, and keeps an arena per thread: a daemon that is done with a large changeset would
go on looking as large as it was. Source: mallopt(3).
"""

import ctypes

MMAP_THRESHOLD_BYTES = 4 << 20
"""Segments are above it and go back to the system; frames are below it and are used again."""

ARENA_COUNT_MAX = 2
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def bound_memory() -> None:
    """Set the allocator's limits, before threads start; does nothing under another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        mallopt(_M_ARENA_MAX, ARENA_COUNT_MAX)
