"""``understudy mount``: all points of all machines as files."""

import os
from typing import Annotated

import typer

from appliance.applier.points_fuse import serve_points
from appliance.cli.store_choice import Store, find_store
from replication.errors import ConfigError


def mount(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="An empty folder.")],
    *,
    store: Store = None,
) -> None:
    """Serve every point of every machine below DIR, read-only, until interrupted (Ctrl-C)."""
    root = find_store(store)
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder} is not a folder", hint=f"mkdir {folder}")
    typer.echo(f"points are in {folder}/<machine>/<point>/disk0.img; Ctrl-C unmounts", err=True)
    serve_points(root, folder)
