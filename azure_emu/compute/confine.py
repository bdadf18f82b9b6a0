"""Becomes another program, which can reach nothing but what it is given.

``python -I -S confine.py OPTION… -- PROGRAM ARGUMENT…``; `confined` makes that command line.
What the program is to have open is opened here, with this process's rights. Then it keeps no
capability (or one), gets none back, may open only the files that are named (Landlock) and may not
make the calls that act on others without opening anything (seccomp). The process id stays.

This file is run by itself: nothing but the standard library, and little of it, as each start waits.

Source: Linux Documentation/userspace-api/landlock.rst, capabilities(7), prctl(2); libseccomp's
seccomp_rule_add(3); linux/if_tun.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import struct
import sys

TYPE_CHECKING = False  # the module that has it takes longer to load than all others here
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import NoReturn

READ, WRITE, OPEN, LISTEN, TAP = "--read", "--write", "--open", "--listen", "--tap"
SEARCH = "--search"

FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/share/qemu", "/usr/share/seabios")
"""Libraries and firmware: a distribution's, the same everywhere."""

FILES = ("/etc/ld.so.cache", "/dev/urandom", "/dev/random")
INTERPRETER = "/lib64/ld-linux-x86-64.so.2"
PROGRAMS = "/usr/bin"
SECCOMP_LIBRARY = "libseccomp.so.2"
"""QEMU needs it as well."""

CANNOT = 126
"""Exit code when the program was not become."""

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = (
    1 << 0,
    1 << 1,
    1 << 2,
    1 << 3,
    1 << 14,
    1 << 15,
)
_FS_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many rights to files a version knows; the first are the same in all."""

_TCP_BIND_AND_CONNECT = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _CLEAR_ALL = 24, 38, 47, 4
_CAPABILITIES_VERSION = 0x20080522
_CAP_DAC_READ_SEARCH = 2

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000

_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # with EPERM
_NOT_EQUAL, _MASKED_EQUAL = 1, 7

REFUSED = (
    # What may be done to files of one's own without opening them.
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchown", "fchownat"),
    *("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr"),
    *("truncate", "utime", "utimes", "futimesat", "utimensat", "creat", "openat2"),
    *("open_by_handle_at", "mount", "umount2", "mount_setattr", "open_tree", "move_mount"),
    # Services of the host take the user for root. What is needed is open already.
    *("socket", "connect", "bind", "io_uring_setup"),
    # Other processes, the kernel.
    *("tkill", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "ptrace", "process_vm_readv"),
    *("process_vm_writev", "process_madvise", "kcmp", "migrate_pages", "move_pages"),
    *("setns", "unshare", "bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key"),
    *("request_key", "shmget", "shmat", "shmctl", "semctl", "msgctl", "mq_open", "mq_unlink"),
)
"""Calls that Landlock does not judge and that root's user needs no capability for."""

REFUSED_OF_OTHERS = {
    **dict.fromkeys(("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"), 0),
    "prlimit64": 0,
}
"""Calls with the argument that has to be this process, or 0 for prlimit64."""

_F_SETOWN, _F_SETOWN_EX = 8, 15


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def confined(
    command: Sequence[str],
    *,
    read: Iterable[str] = (),
    write: Iterable[str] = (),
    opened: Iterable[tuple[int, str]] = (),
    listening: tuple[int, str] | None = None,
    tap: tuple[int, str] | None = None,
    search: bool = False,
) -> list[str]:
    """The command line by which ``command``, a program of the system, is run confined.

    read, write: files and devices that it may open, as far as they are there.
    opened:      descriptors that it gets, of files to be read.
    listening:   a descriptor that it gets, of a socket that is made anew.
    tap:         a descriptor that it gets, of an interface of its network namespace.
    search:      it keeps CAP_DAC_READ_SEARCH, to reach files in other users' folders by name.

    Without Landlock the rest holds; whether that does is for whoever asks `landlock_version`.
    """
    options: list[str] = []
    for path in read:
        options += [READ, path]
    for path in write:
        options += [WRITE, path]
    for number, path in opened:
        options += [OPEN, str(number), path]
    if listening is not None:
        options += [LISTEN, str(listening[0]), listening[1]]
    if tap is not None:
        options += [TAP, str(tap[0]), tap[1]]
    if search:
        options.append(SEARCH)
    return [sys.executable, "-I", "-S", "-B", __file__, *options, "--", *command]


def landlock_version() -> int:
    """Of the kernel's Landlock; 0: it has none, or it is switched off."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)))


def _main(words: list[str]) -> NoReturn:
    options, command = words[: words.index("--")], words[words.index("--") + 1 :]
    program = os.path.realpath(os.path.join(PROGRAMS, command[0]))
    files = dict.fromkeys(FOLDERS, _READ_FILE | _READ_DIR) | dict.fromkeys(FILES, _READ_FILE)
    files["/dev/null"] = _READ_FILE | _WRITE_FILE
    files |= dict.fromkeys((program, INTERPRETER), _READ_FILE | _EXECUTE)
    kept = None
    rest = iter(options)
    for option in rest:
        if option == READ:
            files[next(rest)] = _READ_FILE
        elif option == WRITE:
            files[next(rest)] = _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV
        elif option == OPEN:
            _give(int(next(rest)), os.open(next(rest), os.O_RDONLY))
        elif option == LISTEN:
            _give(int(next(rest)), _listen(next(rest)))
        elif option == TAP:
            _give(int(next(rest)), _attach(next(rest)))
        elif option == SEARCH:
            kept = _CAP_DAC_READ_SEARCH
        else:
            raise ValueError(f"{option} is no option")
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by this interpreter alone
        signal.signal(ignored, signal.SIG_DFL)
    _keep_capability(kept)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _refuse_calls()
    if version := landlock_version():
        _restrict(version, files)
    os.execv(program, command)  # noqa: S606 - that is the point


def _give(number: int, fd: int) -> None:
    """Have ``number`` be what ``fd`` is, also in the program."""
    os.dup2(fd, number)
    if fd != number:
        os.close(fd)


def _listen(path: str) -> int:
    import _socket  # noqa: PLC0415 - the module around it takes longer than all of this

    try:  # noqa: SIM105 - contextlib takes longer than all of this
        os.unlink(path)
    except FileNotFoundError:
        pass
    listening = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0)
    before = os.umask(0o177)
    listening.bind(path)
    os.umask(before)
    listening.listen(1)
    return listening.detach()


def _attach(tap: str) -> int:
    import _socket  # noqa: PLC0415 - as above

    _socket.if_nametoindex(tap)  # else one would be made
    fd = os.open("/dev/net/tun", os.O_RDWR)
    wanted = struct.pack("16sH22x", tap.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
    fcntl.ioctl(fd, _TUNSETIFF, wanted)
    os.set_blocking(fd, False)
    return fd


def _keep_capability(kept: int | None) -> None:
    """Of all sets; the bounding set is what a program of root's user would get."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for each in range(last + 1):
        if each != kept:
            _check(_libc.prctl(_PR_CAPBSET_DROP, each, 0, 0, 0), f"capability {each}")
    _check(_libc.prctl(_PR_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0), "ambient capabilities")
    low = 0 if kept is None else 1 << kept
    header = struct.pack("Ii", _CAPABILITIES_VERSION, 0)
    _check(_libc.capset(header, struct.pack("6I", low, low, 0, 0, 0, 0)), "capabilities")


def _refuse_calls() -> None:
    library = ctypes.CDLL(SECCOMP_LIBRARY)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))

    def refuse(call: str, *when: tuple[int, int, int, int]) -> None:
        number = library.seccomp_syscall_resolve_name(call.encode())
        if number < 0:
            return  # the library or the machine does not know it
        told = (_Comparison * len(when))(*(_Comparison(*each) for each in when))
        code = library.seccomp_rule_add_array(
            context, ctypes.c_uint32(_REFUSE), number, len(when), told
        )
        if code:
            raise OSError(-code, f"seccomp: {call}")

    for call in REFUSED:
        refuse(call)
    own = os.getpid()
    for call, argument in REFUSED_OF_OTHERS.items():
        refuse(call, (argument, _NOT_EQUAL, 0 if call == "prlimit64" else own, 0))
    for command in (_F_SETOWN, _F_SETOWN_EX):
        refuse("fcntl", (1, _MASKED_EQUAL, 0xFFFFFFFF, command))
    # Before version 3 Landlock does not see that a file is made empty.
    for call, argument in (("open", 1), ("openat", 2)):
        refuse(call, (argument, _MASKED_EQUAL, os.O_TRUNC, os.O_TRUNC))
    code = library.seccomp_load(context)
    if code:
        raise OSError(-code, "seccomp")


def _restrict(version: int, files: dict[str, int]) -> None:
    handled = (1 << _FS_RIGHTS_BY_ABI[min(version, max(_FS_RIGHTS_BY_ABI))]) - 1
    told = struct.pack("Q", handled)
    if version >= 4:
        told += struct.pack("Q", _TCP_BIND_AND_CONNECT)
    if version >= 6:
        told += struct.pack("Q", _ABSTRACT_SOCKETS_AND_SIGNALS)
    rules = _libc.syscall(_CREATE_RULESET, told, ctypes.c_size_t(len(told)), 0)
    _check(rules, "Landlock")
    for path, rights in files.items():
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # the program, which needs it or not, tells
        rule = struct.pack("=Qi", rights & handled, fd)
        _check(_libc.syscall(_ADD_RULE, rules, _PATH_BENEATH, rule, 0), f"Landlock: {path}")
        os.close(fd)
    _check(_libc.syscall(_RESTRICT_SELF, rules, 0), "Landlock")
    os.close(rules)


def _check(answer: int, what: str) -> None:
    if answer < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)


if __name__ == "__main__":
    try:
        _main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.stderr.write(f"cannot be confined: {error}\n")
        sys.exit(CANNOT)
