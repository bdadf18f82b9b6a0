"""``understudy machines``: what is protected, how fresh it is and how well.

Asks the config server; with ``--store``, or where nobody is signed in, reads an applier's store.
"""

from typing import Annotated, Any

import typer

from appliance.cli.api_client import connect, part
from appliance.cli.names import Store, complete_machine
from appliance.cli.output import (
    AsJson,
    Column,
    percent,
    print_json,
    print_line,
    print_pairs,
    print_rows,
    size,
    span,
    state_style,
    text_or_dash,
)
from appliance.cli.sign_in import find_sign_in
from appliance.cli.vms import vm_machine, vm_row
from replication.errors import ConfigError


def machines(
    machine: Annotated[
        str | None,
        typer.Argument(
            metavar="[MACHINE]", help="Show one, whole.", autocompletion=complete_machine
        ),
    ] = None,
    *,
    unprotected: Annotated[
        bool, typer.Option("--unprotected", help="What could be protected and is not.")
    ] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the machines: state, health, RPO. With --store: the machines of an applier's store."""
    if store is not None or find_sign_in() is None:
        if machine is not None or unprotected:
            raise ConfigError(
                "a store knows neither one machine's protection nor unprotected ones",
                hint="sign in to the config server: `understudy login URL`",
            )
        # It brings numpy along, which nobody who asks the config server should wait for.
        from appliance.cli.store_machines import list_store  # noqa: PLC0415

        list_store(store, as_json=as_json)
    elif machine is not None:
        _show(machine, as_json=as_json)
    elif unprotected:
        _list_unprotected(as_json=as_json)
    else:
        _list(as_json=as_json)


def _list(*, as_json: bool) -> None:
    with connect() as api:
        found = api.items("/machines")
    if as_json:
        print_json(found)
        return
    print_rows(
        [_row(machine) for machine in found],
        (
            Column("machine", "name"),
            Column("state", "told_state", style=state_style),
            Column("health", "health_state", style=state_style),
            Column("RPO durable", "rpo_durable_seconds", span, right=True),
            Column("restorable", "rpo_restorable_seconds", span, right=True),
            Column("points", "point_count", right=True),
            Column("space", "space_bytes", size, right=True),
            Column("policy", "policy", text_or_dash),
            Column("why", "why", wraps=True),
        ),
        as_json=False,
        none="No machine is enrolled yet.",
    )


def _row(machine: dict[str, Any]) -> dict[str, Any]:
    health = machine.get("health") or {}
    reasons = health.get("reasons") or []
    return {
        **machine,
        "told_state": _state(machine),
        "health_state": health.get("state", "-") if machine["state"] != "unprotected" else "-",
        "why": reasons[0]["message"] if reasons else "",
    }


def _state(machine: dict[str, Any]) -> str:
    share = progress_share(machine)
    return machine["state"] if share is None else f"{machine['state']} {percent(share)}"


def progress_share(machine: dict[str, Any]) -> float | None:
    """How far an initial replication or a resync is; None where there is none."""
    progress = machine.get("progress") or {}
    done, total = progress.get("done_bytes"), progress.get("total_bytes")
    return done / total if done is not None and total else None


def _list_unprotected(*, as_json: bool) -> None:
    """Virtual machines that no agent is known of, and machines whose agents are enrolled."""
    with connect() as api:
        vms = api.items("/vms", {"unprotected": True})
        enrolled = api.items("/machines", {"unprotected": True})
    if as_json:
        print_json({"vms": vms, "machines": enrolled})
        return
    known = {vm_machine(vm) for vm in vms}
    rows = [{**vm_row(vm), "agent": "enrolled" if vm_machine(vm) else "none"} for vm in vms]
    for one in enrolled:
        if not known & {one["name"], one["id"]}:
            disks = one.get("disks") or []
            whole = sum(disk["size_bytes"] for disk in disks)
            rows.append({**one, "disk_count": len(disks), "disk_bytes": whole, "agent": "enrolled"})
    print_rows(
        sorted(rows, key=lambda row: str(row["name"])),
        (
            Column("machine", "name"),
            Column("vCenter", "vcenter", text_or_dash),
            Column("power", "power", text_or_dash),
            Column("disks", "disk_count", text_or_dash, right=True),
            Column("size", "disk_bytes", size, right=True),
            Column("agent", "agent"),
            Column("system", "system", text_or_dash),
        ),
        as_json=False,
        none="Everything that is known is protected.",
    )


def _show(name: str, *, as_json: bool) -> None:
    with connect() as api:
        machine = api.get(f"/machines/{part(name)}")
    if as_json:
        print_json(machine)
        return
    health = machine.get("health") or {}
    print_pairs(
        [
            ("machine", machine["name"]),
            ("id", machine["id"]),
            ("state", _state(machine)),
            ("health", health.get("state", "-")),
            ("policy", text_or_dash(machine.get("policy"))),
            ("RPO durable", span(machine.get("rpo_durable_seconds"))),
            ("RPO restorable", span(machine.get("rpo_restorable_seconds"))),
            ("process server", text_or_dash(machine.get("process_server"))),
            ("applier", text_or_dash(machine.get("applier"))),
            ("recovery points", str(machine.get("point_count", 0))),
            ("space they take", size(machine.get("space_bytes"))),
        ]
    )
    for reason in health.get("reasons") or []:
        print_line(
            f"  {reason['severity']}: {reason['message']}", style=state_style(reason["severity"])
        )
        print_line(f"    action  {reason['action']}", style="dim")
    disks = machine.get("disks") or []
    if disks:
        print_line("")
        print_rows(
            [disk_row(disk) for disk in disks],
            (
                Column("disk", "index", text_or_dash, right=True),
                Column("device", "device"),
                Column("size", "size_bytes", size, right=True),
                Column("replicated", "told", wraps=True),
            ),
            as_json=False,
            none="",
        )


def disk_row(disk: dict[str, Any]) -> dict[str, Any]:
    """With ``told``: whether it is replicated, and why not."""
    told = "yes" if disk["protected"] else disk.get("reason") or "no"
    return {**disk, "told": told if disk.get("present", True) else f"{told}; it is not there"}
