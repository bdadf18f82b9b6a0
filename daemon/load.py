"""How the host of a daemon is: share of the CPUs in use, and memory.

Source: proc_stat(5), proc_meminfo(5).
"""

from dataclasses import dataclass

from replication.control.report import Load

STAT = "/proc/stat"
MEMINFO = "/proc/meminfo"
_IDLE, _IO_WAIT, _GUEST = 3, 4, 8


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Of all CPUs together since the start of the host, in the kernel's ticks."""

    busy: int
    total: int

    def share_since(self, before: "CpuTimes") -> float | None:
        """How much of the time between two looks was used, 0 to 1; None when none has passed."""
        passed = self.total - before.total
        if passed <= 0:
            return None
        return min(1.0, max(0.0, (self.busy - before.busy) / passed))


def parse_cpu_times(text: str) -> CpuTimes | None:
    """Read the first line of /proc/stat; None where it is not as expected.

    Time as a guest is part of the time as a user, and waiting for disks is no use of a CPU.
    """
    fields = text.partition("\n")[0].split()
    if len(fields) <= _IO_WAIT + 1 or fields[0] != "cpu":
        return None
    ticks = [int(field) for field in fields[1 : _GUEST + 1] if field.isdecimal()]
    if len(ticks) <= _IO_WAIT:
        return None
    total = sum(ticks)
    return CpuTimes(total - ticks[_IDLE] - ticks[_IO_WAIT], total)


def parse_memory(text: str) -> tuple[int, int]:
    """Bytes there are and bytes in use, from /proc/meminfo; zeros where it cannot be told."""
    sizes = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        fields = rest.split()
        if fields and fields[0].isdecimal():
            sizes[name] = int(fields[0]) << 10
    total = sizes.get("MemTotal", 0)
    return total, max(0, total - sizes.get("MemAvailable", sizes.get("MemFree", total)))


class LoadMeter:
    """Looks at the host again and again: the CPU's share is that since the look before."""

    def __init__(self) -> None:
        self._before = parse_cpu_times(_read(STAT))
        self._share: float | None = None

    def read(self) -> Load:
        """How the host is now."""
        now = parse_cpu_times(_read(STAT))
        if now is not None and self._before is not None:
            share = now.share_since(self._before)
            self._share = self._share if share is None else share
        self._before = now
        memory_bytes, used_bytes = parse_memory(_read(MEMINFO))
        return Load(cpu_share=self._share, memory_bytes=memory_bytes, memory_used_bytes=used_bytes)


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:  # a host that does not tell
        return ""
