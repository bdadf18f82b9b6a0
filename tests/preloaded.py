"""Daemons without the cost of their start: forked from a process that has loaded their code.

Loading it takes a daemon one to two seconds of CPU, and these tests start hundreds. What is forked
is a process like any other, with its own session, files and end; it runs the daemon's ``__main__``.
Only what is measured differs: its resident memory has other daemons' code in it too.

As a program it is the process that is forked from. It reads requests from the socket that it got
as its standard input, and ends when that is closed.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]
REQUEST_BYTES_MAX = 65536
_STATUS = struct.Struct("<i")


class Forked:
    """A daemon, with what the tests need of ``subprocess.Popen``."""

    def __init__(self, pid: int, ended_fd: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended_fd = ended_fd
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._pidfd = -1

    def poll(self) -> int | None:
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        code = self._look(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended_fd], [], [], seconds)[0]:
            told = os.read(self._ended_fd, _STATUS.size)
            assert told, "the process that daemons are forked from has ended"
            self.returncode = os.waitstatus_to_exitcode(_STATUS.unpack(told)[0])
            os.close(self._ended_fd)
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
        return self.returncode


def start_daemon(
    module: str,
    *arguments: str,
    log_fd: int,
    cwd: Path = ROOT,
    environment: Mapping[str, str] = os.environ,
) -> Forked:
    """Run ``module`` in a session of its own; its output goes to ``log_fd``."""
    channel = _channel()
    request = {
        "module": module,
        "arguments": arguments,
        "cwd": str(cwd),
        "environment": dict(environment),
    }
    ended_fd, told_fd = os.pipe()
    try:
        socket.send_fds(channel, [json.dumps(request).encode()], [log_fd, told_fd])
    finally:
        os.close(told_fd)
    answer = channel.recv(REQUEST_BYTES_MAX)
    assert answer, "the process that daemons are forked from has ended"
    return Forked(int(answer), ended_fd)


@functools.cache
def _channel() -> socket.socket:
    """To the process that daemons are forked from: one for this process, until it ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.preloaded"], stdin=theirs.fileno(), cwd=ROOT
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(channel: socket.socket) -> None:
    told: dict[int, int] = {}

    def reap(_: int = 0, __: FrameType | None = None) -> None:
        for pid in list(told):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                fd = told.pop(pid)
                with contextlib.suppress(BrokenPipeError):
                    os.write(fd, _STATUS.pack(status))
                os.close(fd)

    wakeup_fd, wakening_fd = os.pipe()
    os.set_blocking(wakening_fd, False)
    os.set_blocking(wakeup_fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakening_fd, warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([channel.fileno(), wakeup_fd], [], [])
        if wakeup_fd in ready:
            os.read(wakeup_fd, 4096)
            reap()
        if channel.fileno() not in ready:
            continue
        data, fds, _, _ = socket.recv_fds(channel, REQUEST_BYTES_MAX, 2)
        if not data:
            return
        log_fd, told_fd = fds
        request = json.loads(data)
        _load(request["module"])
        pid = os.fork()
        if pid == 0:
            for fd in (told_fd, *told.values(), wakeup_fd, wakening_fd):
                os.close(fd)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _become(channel, log_fd, request)
        os.close(log_fd)
        told[pid] = told_fd
        channel.send(str(pid).encode())


@functools.cache
def _load(module: str) -> None:
    importlib.import_module(f"{module}.__main__")
    gc.collect()
    gc.freeze()


def _become(channel: socket.socket, log_fd: int, request: dict[str, object]) -> None:
    """The child: run the module as ``python -m`` does, and end as it ends."""
    os.setsid()
    nothing_fd = os.open(os.devnull, os.O_RDONLY)
    for fd, place in ((nothing_fd, 0), (log_fd, 1), (log_fd, 2)):
        os.dup2(fd, place)
    channel.detach()
    os.close(log_fd)
    os.close(nothing_fd)
    os.chdir(str(request["cwd"]))
    os.environ.clear()
    environment, arguments = request["environment"], request["arguments"]
    assert isinstance(environment, dict)
    assert isinstance(arguments, list)
    os.environ.update(environment)
    sys.argv[1:] = arguments
    module = str(request["module"])
    sys.modules.pop(f"{module}.__main__", None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=0))
