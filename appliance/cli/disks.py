"""``understudy disks``: which disks of a machine are replicated."""

from typing import Annotated

import typer

from appliance.cli.api_client import ApiClient, connect, part
from appliance.cli.jobs import started
from appliance.cli.machines import disk_row
from appliance.cli.names import MachineName, Wait
from appliance.cli.output import AsJson, Column, print_json, print_rows, size, text_or_dash
from replication.errors import NotFoundError

app = typer.Typer(no_args_is_help=True, help="Which disks of a machine are replicated.")


@app.command("list")
def list_disks(machine: MachineName, *, as_json: AsJson = False) -> None:
    """List a machine's disks, and why one cannot be replicated."""
    with connect() as api:
        disks = api.get(f"/machines/{part(machine)}")["disks"]
    if as_json:
        print_json(disks)
        return
    print_rows(
        [disk_row(disk) for disk in disks],
        (
            Column("disk", "index", text_or_dash, right=True),
            Column("device", "device"),
            Column("size", "size_bytes", size, right=True),
            Column("system", "is_system", lambda flag: "yes" if flag else ""),
            Column("id", "id"),
            Column("replicated", "told", wraps=True),
        ),
        as_json=False,
        none=f"{machine} tells of no disk.",
    )


@app.command()
def add(
    machine: MachineName,
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="As /dev/sdb, or its id.")],
    *,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Replicate one more disk of a protected machine."""
    with connect() as api:
        job = api.post(f"/machines/{part(machine)}/disks", {"device": device})
        started(api, job, wait=wait, as_json=as_json)


@app.command("exclude")
def exclude_disk(
    machine: MachineName,
    disk: Annotated[str, typer.Argument(metavar="DISK", help="Its number, or its device.")],
    *,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Replicate a disk no longer; points that have it stay."""
    with connect() as api:
        index = disk if disk.isdecimal() else _index_of(api, machine, disk)
        job = api.delete(f"/machines/{part(machine)}/disks/{part(index)}")
        started(api, job, wait=wait, as_json=as_json)


def _index_of(api: ApiClient, machine: str, wanted: str) -> str:
    for disk in api.get(f"/machines/{part(machine)}")["disks"]:
        if wanted in (disk["device"], disk["id"]) and disk["protected"]:
            return str(disk["index"])
    raise NotFoundError(
        f"{wanted} is no replicated disk of {machine}",
        hint=f"`understudy disks list {machine}` shows them",
    )
