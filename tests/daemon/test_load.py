"""How a host is, from what its kernel tells."""

import time

from hypothesis import given
from hypothesis import strategies as st

from daemon.load import CpuTimes, LoadMeter, parse_cpu_times, parse_memory

STAT = "cpu  100 10 50 800 40 5 5 0 60 0\ncpu0 1 2 3 4\nintr 5\n"
MEMINFO = (
    "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    400 kB\nHugeTotal: 3\n"
)


def test_guests_count_once_and_waiting_for_disks_is_idle() -> None:
    assert parse_cpu_times(STAT) == CpuTimes(busy=170, total=1010)


def test_share_is_that_of_the_time_between_two_looks() -> None:
    assert CpuTimes(270, 1210).share_since(CpuTimes(170, 1010)) == 0.5
    assert CpuTimes(170, 1010).share_since(CpuTimes(170, 1010)) is None


def test_memory_that_can_be_had_is_not_in_use() -> None:
    assert parse_memory(MEMINFO) == (1000 << 10, 600 << 10)
    assert parse_memory("MemTotal: 10 kB\nMemFree: 4 kB\n") == (10 << 10, 6 << 10)


@given(st.text() | st.from_regex(r"cpu( -?[0-9]{1,4}){0,12}"))
def test_what_is_not_as_expected_is_not_told(text: str) -> None:
    times = parse_cpu_times(text)
    assert times is None or 0 <= times.busy <= times.total
    total, used = parse_memory(text)
    assert 0 <= used <= total


def test_this_host_tells() -> None:
    meter = LoadMeter()
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    load = meter.read()
    assert load.cpu_share is not None
    assert 0 < load.cpu_share <= 1
    assert 0 < load.memory_used_bytes < load.memory_bytes
