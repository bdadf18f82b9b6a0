"""``understudy export``: one disk of a recovery point as a raw image."""

import os
from typing import Annotated

import typer

from appliance.applier.store import export as write_image
from appliance.cli.output import AsJson, mebibytes, print_json, progress_bytes
from appliance.cli.store_choice import (
    Machine,
    PointName,
    Store,
    find_disk,
    find_machine,
    find_point,
)
from replication.errors import ConfigError


def export(
    machine: Machine,
    *,
    output: Annotated[str, typer.Option(metavar="FILE", help="The image to write.")],
    point: PointName = "latest",
    disk: Annotated[
        int | None, typer.Option(help="Its index; needed where there are more.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Write one disk of a point to FILE, sparse; every block is checked on the way."""
    reader = find_machine(store, machine)
    found = find_point(reader, point)
    shape = find_disk(found, disk)
    if os.path.exists(output) and not force:
        raise ConfigError(f"{output} is there already", hint="choose another name, or use --force")
    with (
        reader.open_view(found.position, shape.index) as view,
        progress_bytes(f"disk {shape.index}", view.size_bytes, quiet=as_json) as report,
    ):
        data_bytes = write_image(view, output, lambda done, _: report(done))
    if as_json:
        print_json(
            {
                "file": output,
                "position": found.position,
                "disk": shape.index,
                "size_bytes": shape.size_bytes,
                "data_bytes": data_bytes,
            }
        )
    else:
        typer.echo(f"{output}: {mebibytes(shape.size_bytes)}, {mebibytes(data_bytes)} of it data")
