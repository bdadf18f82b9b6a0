"""``understudy components``: process servers, appliers and vCenters."""

import time
from typing import Any

from appliance.cli.api_client import connect
from appliance.cli.output import (
    AsJson,
    Column,
    percent,
    print_json,
    print_line,
    print_rows,
    size,
    span,
    state_style,
    text_or_dash,
)


def components(*, as_json: AsJson = False) -> None:
    """List process servers, appliers and vCenters: how loaded and how well they are."""
    with connect() as api:
        found = api.items("/components")
    if as_json:
        print_json(found)
        return
    print_rows(
        [_row(component) for component in found],
        (
            Column("component", "name"),
            Column("kind", "kind"),
            Column("health", "state", style=state_style),
            Column("machines", "machine_count", text_or_dash, right=True),
            Column("heard", "heard", right=True),
            Column("CPU", "cpu_share", percent, right=True),
            Column("memory", "memory_share", percent, right=True),
            Column("spool", "spool_share", percent, right=True),
            Column("backlog", "backlog_seconds", span, right=True),
            Column("free", "free_bytes", size, right=True),
        ),
        as_json=False,
        none="No process server, applier or vCenter is known yet.",
    )
    for component in found:
        for reason in component["health"]["reasons"]:
            told = f"{component['name']}: {reason['message']}; {reason['action']}"
            print_line(told, style=state_style(reason["severity"]))


def _row(component: dict[str, Any]) -> dict[str, Any]:
    health = component["health"]
    return {
        **component,
        "state": health["state"],
        "heard": _ago(component["seen_ns"]),
        "memory_share": _share(component["memory_used_bytes"], component["memory_bytes"]),
        "spool_share": _share(component["spool_bytes"], component["spool_max_bytes"]),
    }


def _share(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def _ago(seen_ns: int) -> str:
    return f"{span((time.time_ns() - seen_ns) / 1e9)} ago" if seen_ns else "never"
