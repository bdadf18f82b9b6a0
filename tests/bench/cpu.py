"""Which part used how much of the processors while something was measured: the profile of a row."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.part import Part

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class CpuShares:
    """CPU seconds of each part over ``seconds``; ``told`` once the time is over."""

    seconds: float = 0.0
    used_seconds: dict[str, float] = field(default_factory=dict)

    def told(self) -> str:
        """Cores in use by each part, as ``agent 0.61, azure 0.93 of 2 cores``."""
        shares = ", ".join(
            f"{name} {used / self.seconds:.2f}" for name, used in self.used_seconds.items()
        )
        return f"CPU: {shares} of {os.cpu_count()} cores"


@contextlib.contextmanager
def cpu_of(parts: Sequence[Part]) -> Iterator[CpuShares]:
    """Measure the parts and their children while the block runs."""
    shares = CpuShares()
    before = {part.name: _cpu_seconds(part.pid) for part in parts}
    began = time.monotonic()
    yield shares
    shares.seconds = time.monotonic() - began
    shares.used_seconds = {part.name: _cpu_seconds(part.pid) - before[part.name] for part in parts}


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process and of all that it has started. proc_pid_stat(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    fields = text.rpartition(")")[2].split()
    own = sum(int(value) for value in fields[11:15]) / _TICKS_PER_SECOND
    return own + sum(_cpu_seconds(int(child)) for child in children)
