"""Which store, machine and point a command is about."""

import os
import uuid
from typing import Annotated

import typer

from appliance.applier.store import Point, ReaderStore, machines_in, open_reader
from appliance.applier.store.point_names import LATEST, point_name
from appliance.cli.names import STORE_VARIABLE, STORES_LOOKED_FOR, Store
from replication.bookmark import DiskShape
from replication.errors import ConfigError

__all__ = [
    "Machine",
    "PointName",
    "Store",
    "find_disk",
    "find_machine",
    "find_point",
    "find_store",
    "store_instead",
]

Machine = Annotated[str, typer.Argument(metavar="MACHINE", help="A machine's name or id.")]
PointName = Annotated[
    str,
    typer.Option(
        "--point", metavar="ID", help="A point's name or position, as `points` lists it; or latest."
    ),
]


def find_store(store: str | None) -> str:
    """The folder of the store; ConfigError when there is none."""
    for folder in (store,) if store else STORES_LOOKED_FOR:
        if os.path.isdir(os.path.join(folder, "machines")):
            return folder
    raise ConfigError(
        f"there is no store in {store or ' or '.join(STORES_LOOKED_FOR)}",
        hint=f"name the applier's store with --store DIR or {STORE_VARIABLE}",
    )


def store_instead(store: str | None) -> str:
    """The store of a command that asks the config server where somebody is signed in.

    Where none is named, it says whose answer follows. ConfigError when there is none.
    """
    if store is not None:
        return find_store(store)
    try:
        root = find_store(None)
    except ConfigError as error:
        raise ConfigError(
            f"not signed in to a config server, and {error.args[0]}",
            hint="`understudy login URL`; or, on an applier's host, name its store with "
            f"--store DIR or {STORE_VARIABLE}",
        ) from error
    typer.echo(f"not signed in: from the store in {root}", err=True)
    return root


def find_machine(store: str | None, wanted: str) -> ReaderStore:
    """The machine by name or id; ConfigError that lists what there is."""
    root = find_store(store)
    readers = [open_reader(root, machine) for machine in machines_in(root)]
    try:
        machine = uuid.UUID(wanted)
    except ValueError:
        machine = None
    found = [reader for reader in readers if reader.machine == machine or reader.name == wanted]
    if len(found) == 1:
        return found[0]
    names = ", ".join(sorted(reader.name or str(reader.machine) for reader in readers)) or "none"
    what = "more than one machine is" if found else "no machine is"
    raise ConfigError(f"{what} called {wanted!r}", hint=f"the store holds: {names}")


def find_point(reader: ReaderStore, wanted: str) -> Point:
    """A recovery point by name or position, or the newest; ConfigError when there is none."""
    points = reader.points()
    if not points:
        raise ConfigError(
            f"{reader.name} has no recovery point yet",
            hint="the first one exists when its initial replication is complete",
        )
    if wanted == LATEST:
        return points[-1]
    for point in points:
        if wanted in (point_name(point), str(point.position)):
            return point
    raise ConfigError(
        f"{reader.name} has no point {wanted!r}",
        hint=f"it has {point_name(points[0])} to {point_name(points[-1])}; "
        f"see `understudy points {reader.name}`",
    )


def find_disk(point: Point, wanted: int | None) -> DiskShape:
    """A disk of a point by index; the only one where none is named."""
    indexes = ", ".join(str(shape.index) for shape in point.disks)
    if wanted is None and len(point.disks) == 1:
        return point.disks[0]
    for shape in point.disks:
        if shape.index == wanted:
            return shape
    what = "say which disk" if wanted is None else f"there is no disk {wanted}"
    raise ConfigError(what, hint=f"--disk is one of {indexes}")
