"""All benchmarks by name, in the order in which they run."""

from collections.abc import Callable, Mapping

from tests.bench import (
    applying,
    churn,
    control,
    discovery,
    huge,
    memory,
    pause,
    points,
    reading,
    recovery,
    resync,
    stream,
    tracking,
)
from tests.bench.figure import Row
from tests.bench.place import Place

BENCHMARKS: Mapping[str, Callable[[Place], list[Row]]] = {
    "agent": stream.measure_agent,
    "cache": stream.measure_cache,
    "tracking": tracking.measure,
    "pause": pause.measure,
    "delta": churn.measure_delta,
    "rpo": churn.measure_rpo,
    "memory": memory.measure,
    "applying": applying.measure,
    "reading": reading.measure_reading,
    "views": reading.measure_views,
    "merging": reading.measure_merging,
    "points": points.measure,
    "discovery": discovery.measure,
    "control": control.measure,
    "resync": resync.measure,
    "huge": huge.measure,
    "disks": recovery.measure_disks,
    "boots": recovery.measure_boots,
    "plan": recovery.measure_plan,
}
