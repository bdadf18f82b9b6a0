"""A drill's report with something of everything."""

import base64
import struct
import zlib
from typing import Any

from appliance.config_server.recovery.drills.report import DrillDocument

BEGAN_NS = 1_795_000_000 * 10**9


def png(width: int = 320, height: int = 180, *, shade: int = 30) -> str:
    """A picture of a terminal, more or less."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = b"".join(
        b"\0"
        + bytes(
            210 if y % 12 in (4, 5) and 10 < x < 40 + (y * 37) % 220 else shade
            for x in range(width)
        )
        for y in range(height)
    )
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    whole = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + whole).decode()


def machine(name: str, group: int, seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "machine": name,
        "group": group,
        "state": "cleaned-up",
        "passed": True,
        "point": "20261128T120000Z-000123",
        "point_ns": BEGAN_NS - 42 * 10**9,
        "consistency": "crash",
        "rto_seconds": seconds,
        "rpo_seconds": 42.0,
        "guest": "recovery",
        "address": "10.77.0.5",
        "check": "2 file systems mounted and checked",
        "script_exit": 0,
        "script_output": "accepting connections\n",
        "file_systems": [
            {"disk": 0, "device": "/dev/vda1", "kind": "ext4", "clean": True, "used_bytes": 1 << 31,
             "detail": "journal replayed"},
            {"disk": 1, "device": "/dev/vdb", "kind": "xfs", "clean": True, "used_bytes": 5 << 20},
        ],
        "console": "[    0.000000] Linux version 6.1\n[    2.401] understudy: all mounted\n",
        "screenshot": png(),
        **changes,
    }  # fmt: skip


def drill(**changes: Any) -> DrillDocument:
    whole: dict[str, Any] = {
        "id": "5d0f2f1e-0000-4000-8000-000000000001",
        "of": "plan",
        "target": "shop",
        "schedule": "weekly",
        "asked_by": "schedule weekly",
        "notes": "Quarterly evidence for the auditors.",
        "passed": True,
        "began_ns": BEGAN_NS,
        "run_ended_ns": BEGAN_NS + 31 * 10**9,
        "ended_ns": BEGAN_NS + 39 * 10**9,
        "rto_seconds": 24.7,
        "job": "0197a0c2b1f00011aa22bb33",
        "machines": [
            machine("db-1", 1, 11.2, consistency="app"),
            machine("web-1", 2, 19.9),
            machine("web-2", 2, 24.7, guest="own", file_systems=[], screenshot=png(shade=0)),
        ],
        "actions": [
            {"group": 1, "place": "before", "name": "stop the queue", "kind": "script",
             "state": "done", "exit_code": 0, "seconds": 0.4, "output": "stopped\n", "attempt": 2},
            {"group": 1, "place": "after", "name": "look at the database", "kind": "manual",
             "state": "done", "seconds": 64.0, "resumed_by": "ann", "note": "rows counted"},
            {"group": 2, "place": "after", "name": "tell the monitoring", "kind": "webhook",
             "state": "done", "exit_code": 204, "seconds": 0.1},
        ],
        "steps": [
            {"name": "hold the points", "state": "done", "seconds": 1.1},
            {"name": "make the disks", "state": "done", "seconds": 0.6, "note": "5 disks"},
            {"name": "group 1: start", "state": "done", "seconds": 9.5},
            {"name": "group 2: start", "state": "done", "seconds": 13.5},
        ],
        "cleanup": {
            "state": "succeeded",
            "steps": [{"name": "remove the VMs", "state": "done", "seconds": 2.2}],
        },
        **changes,
    }  # fmt: skip
    return DrillDocument.model_validate(whole)
