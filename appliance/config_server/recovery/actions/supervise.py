"""Runs a program for which nothing may be left when it ends, or when whoever began it does.

``python -I -S -B supervise.py PARENT PROGRAM ARGUMENT…``, PARENT being the process id of who begins
it. This process adopts whatever descendant loses its parent, also one that leads a session of its
own, so that all there are can be found below it. It ends as the program does: with its exit code,
or by its signal. Told to end (SIGTERM), or left by its parent, it ends the program first.

This file is run by itself, with the standard library alone. No privilege is needed.

Source: PR_SET_CHILD_SUBREAPER and PR_SET_PDEATHSIG in prctl(2); children in proc(5).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

TYPE_CHECKING = False  # the module that has it takes longer to load than all others here
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

SWEEP_SECONDS_MAX = 10.0
"""What forks quicker than it can be killed, or is held by the kernel, is given up after that."""

REST_SECONDS = 0.01
NOT_FOUND, CANNOT = 127, 126
"""Exit codes of shells for a program that is not there, or cannot be run."""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_libc = ctypes.CDLL(None)


def command_of(words: Sequence[str]) -> list[str]:
    """The command line of a supervisor of this process's, for a program."""
    return [sys.executable, "-I", "-S", "-B", __file__, str(os.getpid()), *words]


def _main(parent: int, words: list[str]) -> NoReturn:
    heard = {signal.SIGCHLD, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(CANNOT)  # it ended before it could be said that this is to end with it
    program = os.fork()
    if program == 0:
        _become(words)
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # it ends by the program's signal, without a core
    _let_go_of_files()
    status: int | None = None
    while status is None:
        if signal.sigwaitinfo(heard).si_signo == signal.SIGTERM:
            break
        status = _reap()[0].get(program)
    _sweep()
    _end_as(status)


def _become(words: list[str]) -> NoReturn:
    """In the child: lead a session, as if nobody were above."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.setsid()
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execv(words[0], words)  # noqa: S606 - that is the point
    except OSError as error:
        os.write(2, f"cannot run {words[0]}: {error.strerror}\n".encode())
        os._exit(NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT)


def _let_go_of_files() -> None:
    """The program's input and output are not this process's."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)


def _reap() -> tuple[dict[int, int], bool]:
    """Statuses of the children that have ended, by process; and whether there are others."""
    found: dict[int, int] = {}
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found, False
        if process == 0:
            return found, True
        found[process] = status


def _sweep() -> None:
    """Kill the children until there is none; whoever is orphaned by that is a child next.

    Children alone: their numbers are nobody else's until they have been waited for.
    """
    deadline = time.monotonic() + SWEEP_SECONDS_MAX
    while _reap()[1] and time.monotonic() < deadline:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            children = file.read().split()
        for each in children:
            try:  # noqa: SIM105 - contextlib takes longer to load than most scripts run
                os.kill(int(each), signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        signal.sigtimedwait({signal.SIGCHLD}, REST_SECONDS)


def _end_as(status: int | None) -> NoReturn:
    if status is None:
        number = int(signal.SIGTERM)
    elif os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
    else:
        os._exit(os.WEXITSTATUS(status))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
