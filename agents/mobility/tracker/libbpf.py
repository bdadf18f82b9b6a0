"""The part of libbpf that the tracker needs, as Python functions on file descriptors.

A thin binding to libbpf.so.1 (libbpf 1.0 or newer). Every refusal becomes a TrackingError that
says what was tried, the system's reason, what libbpf printed, and what to do. All calls release
the interpreter's lock while they wait.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from replication.errors import TrackingError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAP_TYPE_ARRAY = 2
MAP_MMAPABLE = 1 << 10
MAP_INNER = 1 << 12
WORD_BYTES = 8

PRINTED_LINES_MAX = 12
"""Of what libbpf prints (the verifier's log can be thousands of lines) the last are kept."""

_LINE_BYTES_MAX = 4096
_PRINT_DEBUG = 2

_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _MapOptions(ctypes.Structure):
    """struct bpf_map_create_opts up to map_flags; libbpf takes the rest as zero by its size."""

    _fields_ = (
        ("size_bytes", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
    )


class _MapInfo(ctypes.Structure):
    """struct bpf_map_info up to the name; the kernel fills as much as it is given room for."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
    )


@dataclass(frozen=True, slots=True)
class MapInfo:
    """What the kernel says of a map; ``map_id`` is not given twice between two boots."""

    map_id: int
    entry_count: int
    name: str


class _Printed(threading.local):
    """What libbpf has printed in this thread during the call under way."""

    def __init__(self) -> None:
        self.lines: list[str] = []


_printed = _Printed()


@functools.cache
def _c() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _keep_print(level: int, format_: bytes, arguments: int) -> int:
    if level >= _PRINT_DEBUG:
        return 0
    # A va_list arrives as an address on every 64-bit platform that we know.
    line = ctypes.create_string_buffer(_LINE_BYTES_MAX)
    _c().vsnprintf(
        line, ctypes.c_size_t(_LINE_BYTES_MAX), ctypes.c_char_p(format_), ctypes.c_void_p(arguments)
    )
    _printed.lines.extend(line.value.decode(errors="replace").splitlines())
    del _printed.lines[:-PRINTED_LINES_MAX]
    return 0


_keep_print_pointer = _PRINT(_keep_print)  # the library calls it for as long as the process lives


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise TrackingError(
            f"libbpf.so.1 cannot be loaded: {error}", hint="install Debian's package libbpf1"
        ) from error
    pointer = ctypes.c_void_p
    for name in (
        "bpf_object__open_file",
        "bpf_object__find_map_by_name",
        "bpf_object__find_program_by_name",
        "bpf_program__attach",
    ):
        getattr(library, name).restype = pointer
    library.libbpf_set_print.restype = pointer
    library.libbpf_set_print(_keep_print_pointer)
    return library


def _refusal(what: str, error_number: int) -> TrackingError:
    reason = os.strerror(error_number)
    if _printed.lines:
        reason += "; libbpf says: " + " | ".join(_printed.lines)
        _printed.lines.clear()
    hints = {
        errno.EPERM: "run as root with CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN",
        errno.EACCES: "run as root; a verifier's complaint above means an unsupported kernel",
        errno.ENOENT: "a pin or a kernel symbol is missing; Linux 5.17 or newer with BTF is needed",
        errno.ENOMEM: "the kernel has no memory for the bitmaps: 64 KiB per GiB of disk",
        errno.EINVAL: "Linux 5.17 or newer with CONFIG_BPF_SYSCALL and CONFIG_DEBUG_INFO_BTF",
        errno.EEXIST: "another agent tracks this machine: run one agent per machine",
        errno.E2BIG: "too many disks are tracked for one machine",
    }
    return TrackingError(f"cannot {what}: {reason}", hint=hints.get(error_number))


def _fd(what: str, found: int) -> int:
    """Check what a call of libbpf 1.x returned: a descriptor or -errno."""
    if found < 0:
        raise _refusal(what, -found)
    return found


@contextmanager
def loaded_object(path: str) -> Iterator[int]:
    """Open and load a compiled eBPF object; gives its handle, unloads what is not pinned.

    Raises TrackingError: no such file, or the kernel refuses the program.
    """
    if not os.path.exists(path):
        raise TrackingError(f"the tracker's program {path} is missing", hint="compile it: make bpf")
    library = _library()
    _printed.lines.clear()
    handle = library.bpf_object__open_file(os.fsencode(path), None)
    if not handle:
        raise _refusal(f"open {path}", ctypes.get_errno())
    try:
        _fd(f"load {path} into the kernel", library.bpf_object__load(ctypes.c_void_p(handle)))
        yield handle
    finally:
        library.bpf_object__close(ctypes.c_void_p(handle))


def map_of(handle: int, name: str) -> int:
    """Descriptor of a map of a loaded object; it lives as long as the object."""
    library = _library()
    found = library.bpf_object__find_map_by_name(ctypes.c_void_p(handle), name.encode())
    if not found:
        raise _refusal(f"find the map {name}", ctypes.get_errno())
    return _fd(f"find the map {name}", library.bpf_map__fd(ctypes.c_void_p(found)))


def attach_and_pin(handle: int, program: str, path: str) -> None:
    """Attach a program of a loaded object where its section says; it stays while ``path`` does."""
    library = _library()
    found = library.bpf_object__find_program_by_name(ctypes.c_void_p(handle), program.encode())
    if not found:
        raise _refusal(f"find the program {program}", ctypes.get_errno())
    link = library.bpf_program__attach(ctypes.c_void_p(found))
    if not link:
        raise _refusal(f"attach the program {program}", ctypes.get_errno())
    try:
        pin(library.bpf_link__fd(ctypes.c_void_p(link)), path)
    finally:
        library.bpf_link__destroy(ctypes.c_void_p(link))


def pin(fd: int, path: str) -> None:
    """Give a map or link a name in bpffs, which keeps it in the kernel without a process."""
    _fd(f"pin {path}", _library().bpf_obj_pin(fd, os.fsencode(path)))


def pinned(path: str) -> int:
    """A new descriptor of what is pinned at ``path``; the caller closes it."""
    return _fd(f"open the pin {path}", _library().bpf_obj_get(os.fsencode(path)))


def make_bitmap(name: str, word_count: int) -> int:
    """Make an inner map, all zero; returns a descriptor that the caller closes.

    ``name`` has up to 15 letters and digits.
    """
    options = _MapOptions(size_bytes=ctypes.sizeof(_MapOptions), map_flags=MAP_MMAPABLE | MAP_INNER)
    made = _library().bpf_map_create(
        MAP_TYPE_ARRAY, name.encode(), 4, WORD_BYTES, word_count, ctypes.byref(options)
    )
    return _fd(f"make a bitmap of {word_count * WORD_BYTES} bytes", made)


def map_info(fd: int) -> MapInfo:
    info = _MapInfo()
    room = ctypes.c_uint32(ctypes.sizeof(info))
    _fd(
        "ask for a map's description",
        _library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(room)),
    )
    return MapInfo(info.id, info.max_entries, info.name.decode())


def lookup(fd: int, key: int, value_bytes: int) -> int | None:
    """The number under a 32-bit key, or None; of a map of maps it is the inner map's id."""
    value = ctypes.create_string_buffer(value_bytes)
    found = _library().bpf_map_lookup_elem(fd, ctypes.byref(ctypes.c_uint32(key)), value)
    if found == -errno.ENOENT:
        return None
    _fd("read a map's element", found)
    return int.from_bytes(value.raw, "little")


def update_u64(fd: int, key: int, value: int) -> None:
    number = ctypes.c_uint64(value)
    _fd(
        "write a map's element",
        _library().bpf_map_update_elem(
            fd, ctypes.byref(ctypes.c_uint32(key)), ctypes.byref(number), ctypes.c_uint64(0)
        ),
    )


def update_inner(fd: int, key: int, inner_fd: int) -> None:
    """Put a map into a map of maps.

    Returns when every program that may have seen the map which was there before has ended: the
    kernel waits for an RCU grace period (7 to 40 ms measured).
    """
    number = ctypes.c_uint32(inner_fd)
    _fd(
        "switch the bitmap",
        _library().bpf_map_update_elem(
            fd, ctypes.byref(ctypes.c_uint32(key)), ctypes.byref(number), ctypes.c_uint64(0)
        ),
    )


def delete(fd: int, key: int) -> None:
    """Take a key out of a map; fine if it is not there."""
    done = _library().bpf_map_delete_elem(fd, ctypes.byref(ctypes.c_uint32(key)))
    if done != -errno.ENOENT:
        _fd("delete a map's element", done)


def keys(fd: int) -> list[int]:
    """All keys of a hash map, which nobody changes meanwhile."""
    found: list[int] = []
    before = None
    after = ctypes.c_uint32()
    while True:
        done = _library().bpf_map_get_next_key(
            fd, ctypes.byref(before) if before is not None else None, ctypes.byref(after)
        )
        if done == -errno.ENOENT:
            return found
        _fd("list a map's keys", done)
        found.append(after.value)
        before = ctypes.c_uint32(after.value)


def entries(fd: int, value_bytes: int, entry_count_max: int) -> list[bytes]:
    """All values of a hash map with 64-bit keys that may change meanwhile.

    An entry that is there all the time is among them: the kernel reads bucket by bucket, each under
    its lock, and entries do not move. Source: bpf(2), BPF_MAP_LOOKUP_BATCH.
    """
    keys_out = ctypes.create_string_buffer(8 * entry_count_max)
    values = ctypes.create_string_buffer(value_bytes * entry_count_max)
    count = ctypes.c_uint32(entry_count_max)
    position = ctypes.c_uint32()
    done = _library().bpf_map_lookup_batch(
        fd, None, ctypes.byref(position), keys_out, values, ctypes.byref(count), None
    )
    if done != -errno.ENOENT:  # that is how the end of the map is told
        _fd("read a map's elements", done)
    raw = values.raw[: count.value * value_bytes]
    return [raw[at : at + value_bytes] for at in range(0, len(raw), value_bytes)]


def mount_bpffs(path: str) -> None:
    """Mount a bpf file system at ``path``."""
    if _c().mount(b"bpf", os.fsencode(path), b"bpf", ctypes.c_ulong(0), b"mode=0700") != 0:
        raise _refusal(f"mount bpffs at {path}", ctypes.get_errno())
