"""What a resync costs where nothing differs: bytes on the wire, and time."""

import time

from agents.mobility.leave import leave_order
from tests.bench.figure import AtMost, Row
from tests.bench.place import GIB, MIB, Place, write_random
from tests.e2e.counting_proxy import counting

DATA_BYTES = 512 * MIB
SECONDS_MAX = 600.0


def measure(where: Place) -> list[Row]:
    """Resync of an unchanged 4 GiB disk: bytes both ways between agent and process server."""
    size_bytes = 512 * MIB if where.quick else 4 * GIB
    data_bytes = min(DATA_BYTES, size_bytes // 2)
    with where.rig(agent={"capture": {"audit_chunks": 0}}) as rig:
        disk = rig.add_disk(size_bytes)
        write_random(disk.image, data_bytes)
        with counting(rig.data_port) as proxy:
            rig.settings["agent"]["process_server"] = f"https://127.0.0.1:{proxy.port}"
            rig.start()
            rig.wait_until("the first point", rig.points, SECONDS_MAX)
            before_bytes, began = proxy.passed_bytes, time.monotonic()
            leave_order(str(rig.agent_state / str(rig.machine)))
            rig.wait_until(
                "a point of the new generation",
                lambda: rig.points()[-1].bookmark.stamp.generation > 1,
                SECONDS_MAX,
            )
            moved_bytes, seconds = proxy.passed_bytes - before_bytes, time.monotonic() - began
            rig.agent.stop()
    return [
        Row(
            figure=f"resync of an unchanged disk of {size_bytes / GIB:.1f} GiB, bytes on the wire",
            unit="KiB",
            target=AtMost(1024),
            measured=moved_bytes / 1024,
            note=f"both ways, {data_bytes / MIB:.0f} MiB of it data; {seconds:.1f} s from the "
            "order to the first point",
        )
    ]
