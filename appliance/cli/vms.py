"""``understudy vms``: virtual machines, those at the second site and those that vCenters show."""

import os
from typing import Annotated, Any

import typer

from appliance.cli.api_client import connect
from appliance.cli.failover_choice import FailoverId, find_evidence
from appliance.cli.names import MachineName, complete_vcenter
from appliance.cli.output import (
    AsJson,
    Column,
    print_json,
    print_line,
    print_rows,
    size,
    state_style,
    text_or_dash,
    write_file,
)

app = typer.Typer(
    no_args_is_help=True, help="Virtual machines: at the second site, and in the vCenters."
)


@app.command("list")
def list_vms(*, as_json: AsJson = False) -> None:
    """List the virtual machines at the second site, with the failover that each is of."""
    with connect() as api:
        found = [each for each in api.items("/failovers", {"open": True}) if each.get("vm")]
    if as_json:
        print_json(found)
        return
    print_rows(
        [{**each, **_vm(each)} for each in found],
        (
            Column("machine", "machine"),
            Column("failover", "kind"),
            Column("state", "vm_state", style=state_style),
            Column("guest", "guest", text_or_dash),
            Column("address", "address", text_or_dash),
            Column("network", "network", text_or_dash),
            Column("compute", "compute", text_or_dash),
            Column("space", "space_bytes", size, right=True),
            Column("check", "told_check", text_or_dash, wraps=True),
            Column("id", "id"),
        ),
        as_json=False,
        none="No virtual machine runs at the second site.",
    )


@app.command()
def console(
    machine: MachineName,
    *,
    tail: Annotated[
        int | None, typer.Option(metavar="N", help="Only the last N lines.", min=1)
    ] = None,
    failover: FailoverId = None,
    as_json: AsJson = False,
) -> None:
    """Print what a machine's VM has written to its serial console, also when it is gone."""
    with connect() as api:
        found = find_evidence(api, machine, "console", failover=failover)
        text = api.get_bytes(f"/failovers/{found['id']}/console").decode(errors="replace")
    if tail is not None:
        text = "".join(text.splitlines(keepends=True)[-tail:])
    if as_json:
        print_json({"failover": found["id"], "machine": found["machine"], "console": text})
        return
    for line in text.splitlines():
        print_line(line)


@app.command()
def screenshot(
    machine: MachineName,
    *,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file; MACHINE.png if not given."),
    ] = None,
    failover: FailoverId = None,
    as_json: AsJson = False,
) -> None:
    """Write the picture of a machine's VM to a PNG file, also when it is gone."""
    with connect() as api:
        found = find_evidence(api, machine, "screenshot", failover=failover)
        picture = api.get_bytes(f"/failovers/{found['id']}/screenshot")
    path = output or f"{os.path.basename(found['machine'])}.png"
    write_file(path, picture)
    if as_json:
        print_json({"failover": found["id"], "machine": found["machine"], "file": path})
    else:
        print_line(f"{path}: {size(len(picture))}")


def _vm(failover: dict[str, Any]) -> dict[str, Any]:
    report = failover.get("vm") or {}
    check = report.get("check") or {}
    told = "" if not check else check.get("detail") or ("passed" if check["passed"] else "failed")
    return {
        "vm_state": report.get("state", "-"),
        "guest": report.get("guest", ""),
        "address": report.get("address", ""),
        "space_bytes": report.get("space_bytes"),
        "told_check": told,
    }


@app.command()
def discovered(
    *,
    unprotected: Annotated[
        bool, typer.Option("--unprotected", help="Only those that nothing protects.")
    ] = False,
    vcenter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only of this vCenter.", autocompletion=complete_vcenter),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the virtual machines that the vCenters show; of a stale one the vCenter does not
    answer.
    """
    with connect() as api:
        found = api.items("/vms", {"unprotected": unprotected or None, "vcenter": vcenter})
    if as_json:
        print_json(found)
        return
    print_rows(
        [vm_row(vm) for vm in found],
        VM_COLUMNS,
        as_json=False,
        none="No virtual machine is known; add a vCenter: understudy vcenters add",
    )


VM_COLUMNS = (
    Column("virtual machine", "name"),
    Column("vCenter", "vcenter", text_or_dash),
    Column("power", "power"),
    Column("disks", "disk_count", right=True),
    Column("size", "disk_bytes", size, right=True),
    Column("address", "address", text_or_dash),
    Column("system", "guest_system", text_or_dash),
    Column("protection", "protection"),
)


def vm_row(vm: dict[str, Any]) -> dict[str, Any]:
    disks = vm.get("disks") or []
    return {
        **vm,
        "disk_count": len(disks),
        "disk_bytes": sum(disk.get("capacity_bytes", 0) for disk in disks),
        "address": next(iter(vm.get("addresses") or []), ""),
        "protection": _protection(vm),
    }


def vm_machine(vm: dict[str, Any]) -> str | None:
    """The machine whose agent runs in it, by name or id."""
    machine = vm.get("machine")
    if isinstance(machine, dict):
        machine = machine.get("name")
    return str(machine) if machine else None


def _protection(vm: dict[str, Any]) -> str:
    told = vm.get("protection") or ("no agent" if not vm.get("machine") else "unprotected")
    return f"{told} (stale)" if vm.get("stale") else str(told)
