"""The process that holds file systems frozen, so that they thaw whatever becomes of the agent.

Run by ``freeze.Freezer``; imports nothing of Understudy, locks its memory, and writes nothing but
replies. It talks over standard input, a socket, one JSON object a line:

    {"freeze": ["/data"], "seconds_max": 2}   {"frozen": true} or {"frozen": false, "reasons": {…}}
    {"look": true}                            {"held": true, "reason": ""}
    {"thaw": true}                            {"held": true, "pause_ns": 41000000, "reason": ""}

``freezing_seconds_max`` in a request to freeze: all must be frozen by then, or none stays so.

Each file system has a thread of its own, which freezes it, waits to be released and thaws it; the
wait ends at the deadline. So a file system on which FIFREEZE or FITHAW blocks keeps no other one
frozen, and is itself thawed as soon as its freeze is through. The end of the socket (the agent is
gone) and SIGTERM release all; the process ends only when nothing is frozen.

Source: ioctl_fsfreeze in linux/fs.h; fs/super.c for who may block whom.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import select
import signal
import threading
import time
from typing import Any

FIFREEZE = 0xC0045877
FITHAW = 0xC0045878

CHANNEL = 0
LINE_BYTES_MAX = 1 << 20
MOUNT_COUNT_MAX = 256
STACK_BYTES = 256 << 10
EXPEDITED = "/sys/kernel/rcu_expedited"
NORMAL = "/sys/kernel/rcu_normal"
OUR_MARK = b"21315"
"""What is written to have it expedited: any number but 0 does, and this one says who it was."""

THAW_RETRY_SECONDS = 0.1
LOOK_AGAIN_SECONDS = 0.01

_MCL_CURRENT, _MCL_FUTURE = 1, 2
_OCTAL = re.compile(rb"\\([0-7]{3})")


class Hold:
    """One file system, from before its freeze until after its thaw; ``state`` only moves on."""

    FREEZING, FROZEN, THAWED, FAILED = range(4)

    def __init__(self, path: str, fd: int, deadline: float, wake: int) -> None:
        self.path = path
        self.state = self.FREEZING
        self.reason = ""
        self.since_ns = self.until_ns = 0
        self._fd, self._deadline, self._wake = fd, deadline, wake
        self._release = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def release(self) -> None:
        self._release.set()

    def join(self) -> None:
        self._thread.join()

    def look(self) -> None:
        """Find out whether someone else has thawed it: only then it can be frozen once more."""
        if self.state != self.FROZEN:
            return
        try:
            fcntl.ioctl(self._fd, FIFREEZE, 0)
        except OSError as error:
            if error.errno != errno.EBUSY:
                self.reason = self.reason or (error.strerror or str(error))
        else:
            self.reason = self.reason or "someone else thawed it"

    @property
    def settled(self) -> bool:
        """Not frozen, and not going to be."""
        return self.state in (self.THAWED, self.FAILED)

    def _run(self) -> None:
        self.since_ns = time.monotonic_ns()
        try:
            fcntl.ioctl(self._fd, FIFREEZE, 0)
        except OSError as error:
            self.reason = _freeze_refusal(error)
            self._move(self.FAILED)
        else:
            self._move(self.FROZEN)
            if not self._release.wait(max(0.0, self._deadline - time.monotonic())):
                self.reason = "the time limit passed"
            self._thaw()
            self.until_ns = time.monotonic_ns()
            self._move(self.THAWED)
        finally:
            os.close(self._fd)

    def _thaw(self) -> None:
        while True:
            try:
                fcntl.ioctl(self._fd, FITHAW, 0)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    self.reason = self.reason or "someone else thawed it"
                    return
                # It is still frozen, and there is nobody else to try again.
                time.sleep(THAW_RETRY_SECONDS)
            else:
                return

    def _move(self, state: int) -> None:
        self.state = state
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"\0")


class Haste:
    """Has the kernel hurry while file systems are being frozen.

    FIFREEZE waits for an RCU grace period at each of three levels, two of them while writers wait
    already: 10 to 25 ms each on a busy machine, well under one when the kernel expedites them.
    The switch is the whole machine's and costs an interrupt per CPU and grace period, so it is on
    for no longer than the freezing takes. Where somebody has set it, or wants grace periods to be
    normal (as on real-time machines), it is left alone. Best effort: without it a freeze is slower.

    Source: kernel/rcu/sync.c, fs/super.c; "rcu_expedited" in Documentation/RCU.
    """

    def __init__(self) -> None:
        # A process that was killed in a freeze has left its mark.
        self._restore()

    def begin(self) -> None:
        if _number(EXPEDITED) == 0 and _number(NORMAL) == 0:
            _write(EXPEDITED, OUR_MARK)

    def end(self) -> None:
        self._restore()

    @staticmethod
    def _restore() -> None:
        if _number(EXPEDITED) == int(OUR_MARK):
            _write(EXPEDITED, b"0")


class Session:
    """File systems that are frozen together: all or none, and all no longer than the deadline."""

    def __init__(self, holds: list[Hold], frozen_by: float) -> None:
        self.holds = holds
        self._frozen_by = frozen_by
        self._asked_to_freeze, self._asked_to_thaw = True, False
        for hold in holds:
            hold.start()

    def release(self) -> None:
        for hold in self.holds:
            hold.release()

    def ask_to_thaw(self) -> None:
        self._asked_to_thaw = True
        self.release()

    def seconds_to_wait(self) -> float | None:
        """When to look again even if no thread reports; None: not before one does."""
        if not self._asked_to_freeze:
            return None
        return max(LOOK_AGAIN_SECONDS, self._frozen_by - time.monotonic())

    def reply(self) -> dict[str, Any] | None:
        """The answer to the latest request, once it is due."""
        if self._asked_to_freeze:
            return self._freeze_reply()
        if self._asked_to_thaw and all(hold.settled for hold in self.holds):
            self._asked_to_thaw = False
            return {"held": not self._why_not_held(), **self._account()}
        return None

    def _freeze_reply(self) -> dict[str, Any] | None:
        if all(hold.state == Hold.FROZEN for hold in self.holds):
            self._asked_to_freeze = False
            return {"frozen": True}
        late = time.monotonic() >= self._frozen_by
        failed = [hold for hold in self.holds if hold.settled]
        if not failed and not late:
            return None
        self.release()
        if any(hold.state == Hold.FROZEN for hold in self.holds):
            return None  # it reports when it is thawed
        stuck = [hold for hold in self.holds if not hold.settled]
        if stuck and not late:
            return None
        self._asked_to_freeze = False
        reasons = {hold.path: hold.reason for hold in failed if hold.reason}
        reasons |= {hold.path: "it was not frozen within the time limit" for hold in stuck}
        return {"frozen": False, "reasons": reasons}

    def look(self) -> dict[str, Any]:
        """Whether all are still frozen, and by us."""
        for hold in self.holds:
            hold.look()
        is_held = all(hold.state == Hold.FROZEN and not hold.reason for hold in self.holds)
        return {"held": is_held, "reason": self._why_not_held()}

    def _why_not_held(self) -> str:
        return "; ".join(f"{hold.path}: {hold.reason}" for hold in self.holds if hold.reason)

    def _account(self) -> dict[str, Any]:
        since_ns = min(hold.since_ns for hold in self.holds)
        until_ns = max(hold.until_ns for hold in self.holds)
        return {"pause_ns": max(0, until_ns - since_ns), "reason": self._why_not_held()}


class Server:
    """Answers requests one after another; the one thread that reads and writes the channel."""

    def __init__(self) -> None:
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._buffer = b""
        self._session: Session | None = None
        self._lingering: list[Hold] = []
        self._stopping = False
        self._haste = Haste()

    def run(self) -> None:
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self._on_signal)
        try:
            self._send({"ready": True})
            self._serve()
        except (OSError, ValueError, KeyError, TypeError):
            pass  # the agent is gone or talks nonsense: what matters now is below
        finally:
            # Not in turn: one that is stuck must not keep another one frozen.
            for hold in self._holds():
                hold.release()
            for hold in self._holds():
                hold.join()
            self._haste.end()

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(CHANNEL, select.POLLIN)
        poller.register(self._woken, select.POLLIN)
        while not self._stopping:
            seconds = self._session.seconds_to_wait() if self._session else None
            # Rounded up: a wait that ends just before the deadline would be taken up again.
            found = poller.poll(None if seconds is None else int(seconds * 1000) + 1)
            for fd, _ in found:
                if fd == self._woken:
                    os.read(self._woken, 4096)
                elif not self._receive():
                    return
            reply = self._session.reply() if self._session else None
            if reply is not None:
                self._haste.end()
                if not reply.get("frozen"):
                    self._end_session()
                self._send(reply)

    def _receive(self) -> bool:
        data = os.read(CHANNEL, 1 << 16)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._handle(json.loads(line))
        return bool(data) and len(self._buffer) < LINE_BYTES_MAX

    def _handle(self, request: dict[str, Any]) -> None:
        if "thaw" in request:
            if self._session:
                self._session.ask_to_thaw()
            else:
                self._send({"held": False, "pause_ns": 0, "reason": "nothing was frozen"})
            return
        if "look" in request:
            nothing = {"held": False, "reason": "nothing was frozen"}
            self._send(self._session.look() if self._session else nothing)
            return
        if self._session:
            raise ValueError
        seconds_max = float(request["seconds_max"])
        freezing_seconds_max = float(request.get("freezing_seconds_max", seconds_max))
        self._freeze(request["freeze"], seconds_max, freezing_seconds_max)

    def _freeze(self, paths: list[str], seconds_max: float, freezing_seconds_max: float) -> None:
        now = time.monotonic()
        deadline, frozen_by = now + seconds_max, now + freezing_seconds_max
        self._lingering = [hold for hold in self._lingering if not hold.settled]
        opened: dict[str, int] = {}
        lingering = {hold.path for hold in self._lingering}
        reasons = dict.fromkeys(lingering & {*paths}, "an earlier freeze is not through yet")
        for path in paths[: MOUNT_COUNT_MAX + 1]:
            if path in lingering:
                continue
            try:
                opened[path] = open_mount(path)
            except OSError as error:
                reasons[path] = error.strerror or str(error)
        if len(opened) > MOUNT_COUNT_MAX:
            reasons["/"] = f"no more than {MOUNT_COUNT_MAX} file systems are frozen together"
        if reasons or not opened:
            for fd in opened.values():
                os.close(fd)
            self._send({"frozen": False, "reasons": reasons})
            return
        self._haste.begin()
        holds = [Hold(path, fd, deadline, self._wake) for path, fd in opened.items()]
        self._session = Session(holds, frozen_by)

    def _end_session(self) -> None:
        assert self._session
        self._lingering += [hold for hold in self._session.holds if not hold.settled]
        self._session = None

    def _holds(self) -> list[Hold]:
        return self._lingering + (self._session.holds if self._session else [])

    def _on_signal(self, _signum: int, _frame: object) -> None:
        self._stopping = True

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(CHANNEL, data) :]


def open_mount(path: str) -> int:
    """Open a mount point itself; OSError where nothing is mounted there (any more).

    Else a file system that went away in between would have the one below it frozen.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if _mount_point(fd) != os.fsencode(path):
        os.close(fd)
        raise OSError(errno.EINVAL, "nothing is mounted there")
    return fd


def _mount_point(fd: int) -> bytes:
    """Of the mount that ``fd`` lies on; source: proc_pid_fdinfo(5), proc_pid_mountinfo(5)."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
        mount_id = re.search(rb"^mnt_id:\s*(\d+)$", info.read(), re.MULTILINE)
    with open("/proc/self/mountinfo", "rb") as mounts:
        points = {line.split()[0]: line.split()[4] for line in mounts}
    point = points.get(mount_id[1], b"") if mount_id else b""
    return _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), point)


def _number(path: str) -> int:
    """What a file of the kernel says; -1 where it says nothing."""
    try:
        with open(path, "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return -1


def _write(path: str, text: bytes) -> None:
    with contextlib.suppress(OSError), open(path, "wb") as file:
        file.write(text)


def _freeze_refusal(error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return "it is frozen already, by someone else"
    if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
        return "a file system of this kind cannot be frozen"
    return error.strerror or str(error)


def _stay_in_memory() -> None:
    """What is paged out cannot come back from a frozen disk; best effort."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).mlockall(_MCL_CURRENT | _MCL_FUTURE)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("-1000")


def main() -> None:
    threading.stack_size(STACK_BYTES)
    _stay_in_memory()
    Server().run()


if __name__ == "__main__":
    main()
