"""``understudy vms``: what the vCenters show."""

from typing import Annotated, Any

import typer

from appliance.cli.api_client import connect
from appliance.cli.names import complete_vcenter
from appliance.cli.output import AsJson, Column, print_json, print_rows, size, text_or_dash


def vms(
    *,
    unprotected: Annotated[
        bool, typer.Option("--unprotected", help="Only those that are not protected.")
    ] = False,
    vcenter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only of this vCenter.", autocompletion=complete_vcenter),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the virtual machines that the vCenters show."""
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
