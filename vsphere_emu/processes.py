"""Ending processes with all that they have started, so that none does anything any more.

Source: proc_pid_stat(5), signal(7), pidfd_open(2).
"""

import os
import select
import signal
import time
from collections.abc import Iterable

from replication.errors import StorageError

ROUNDS_MAX = 100


def condemn(roots: Iterable[int]) -> list[int]:
    """Kill the processes and all their descendants, without waiting for their ends.

    All are stopped before the first is killed: a parent that is killed would leave children whom
    nobody knows as such. One that waits in the kernel for a frozen disk dies before it comes back
    from there. Returns descriptors for ``await_end``. Raises StorageError when processes appear
    faster than they can be stopped.
    """
    roots = tuple(roots)
    known: dict[int, int] = {}
    for _ in range(ROUNDS_MAX):
        new = [pid for pid in _with_descendants(roots) if pid not in known]
        if not new:
            break
        for pid in new:
            try:
                known[pid] = os.pidfd_open(pid)
                signal.pidfd_send_signal(known[pid], signal.SIGSTOP)
            except ProcessLookupError:
                continue
    else:
        raise StorageError(f"processes of {roots} appear faster than they can be stopped")
    for descriptor in known.values():
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return list(known.values())


def await_end(condemned: Iterable[int], seconds_max: float) -> None:
    """Wait for the ends of what ``condemn`` returned, and let go of it.

    Raises StorageError when one does not end in time.
    """
    deadline = time.monotonic() + seconds_max
    alive = 0
    for descriptor in condemned:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        if not ended.poll(max(0.0, deadline - time.monotonic()) * 1000):
            alive += 1
        os.close(descriptor)
    if alive:
        raise StorageError(
            f"{alive} processes do not end, even by SIGKILL",
            hint="a file system that they use may be frozen: fsfreeze --unfreeze",
        )


def _with_descendants(roots: Iterable[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (parent := _parent_of(name)) is not None:
            children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.append(pid)
            waiting += children.get(pid, ())
    return found


def has_ended_unreaped(pid: int) -> bool:
    """Whether a process has ended and nobody has asked for its exit code yet: by its number alone
    it seems to live.
    """
    found = _state_of(str(pid))
    return found is not None and found[0] in _ENDED


def _parent_of(pid: str) -> int | None:
    """None for one that has ended."""
    found = _state_of(pid)
    return None if found is None or found[0] in _ENDED else found[1]


def _state_of(pid: str) -> tuple[bytes, int] | None:
    """Its state's letter and its parent; None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]
    except (OSError, ValueError):
        return None
    return state, int(parent)


_ENDED = (b"Z", b"X")
