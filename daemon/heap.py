"""Keeps the C heap from holding on to what a daemon needed in passing.

By its defaults glibc raises the size from which it gives memory back at once to the largest buffer
that was freed, and gives each thread an arena of its own: a daemon that is done with a large
changeset goes on looking as large as it was. Source: mallopt(3).
"""

import ctypes

MAPPED_BYTES_MIN = 4 << 20
"""Segments are above it and go back to the system; frames are below it and are used again: giving
them back would cost page faults with each."""

ARENAS_MAX = 2

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def bound_heap(mapped_bytes_min: int = MAPPED_BYTES_MIN) -> None:
    """Set the allocator's limits, before threads start; does nothing under another C library.

    mapped_bytes_min: buffers from this size on go back to the system when they are freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mapped_bytes_min)
        mallopt(_M_ARENA_MAX, ARENAS_MAX)
