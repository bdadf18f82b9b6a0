"""``understudy resync``: compare both sides and send what differs."""

from typing import Annotated

import typer

from appliance.cli.api_client import connect, part
from appliance.cli.jobs import started
from appliance.cli.names import MachineName, Wait
from appliance.cli.output import AsJson


def resync(
    machine: MachineName,
    *,
    now: Annotated[
        bool, typer.Option("--now", help="At once, whatever the policy's window says.")
    ] = False,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Compare a machine's disks with the second site and send what differs; old points stay."""
    with connect() as api:
        job = api.post(f"/machines/{part(machine)}/resync", {"now": now})
        started(api, job, wait=wait, as_json=as_json)
