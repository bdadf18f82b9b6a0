"""``understudy verify``: re-read points against the digests that were made from the source."""

from typing import Any

import typer

from appliance.applier.store import Damage, Point, ReaderStore
from appliance.applier.store.point_names import point_name
from appliance.applier.store.reports import report_damage
from appliance.cli.output import AsJson, mebibytes, print_json, progress_bytes
from appliance.cli.store_choice import Machine, PointName, Store, find_machine, find_point
from replication.errors import IntegrityError, StorageError

DAMAGES_SHOWN_MAX = 20


def verify(
    machine: Machine,
    *,
    point: PointName = "latest",
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Read every block of a point and compare it with its digest; exit code 6 if one is rotten."""
    reader = find_machine(store, machine)
    found = find_point(reader, point)
    damages, read_bytes = _read_all(reader, found, quiet=as_json)
    if as_json:
        print_json(
            {
                "point": point_name(found),
                "position": found.position,
                "read_bytes": read_bytes,
                "damaged": [_row(damage) for damage in damages],
            }
        )
    elif not damages:
        typer.echo(f"{point_name(found)}: {mebibytes(read_bytes)} read, every block is right")
    if damages:
        told = _report(reader, damages)
        shown = "; ".join(
            f"disk {damage.disk} block {damage.block} ({damage.file} at byte {damage.offset})"
            for damage in damages[:DAMAGES_SHOWN_MAX]
        )
        raise IntegrityError(
            f"{len(damages)} blocks of {point_name(found)} are rotten: {shown}",
            hint=f"they are refused, never served; {told}",
        )


def _report(reader: ReaderStore, damages: list[Damage]) -> str:
    """Leave word for the applier that owns the store; what becomes of it."""
    try:
        report_damage(reader.folder, damages)
    except StorageError:
        return "the applier finds them by its scrub: here it cannot be told"
    return "the applier is told, and asks the source for fresh ones"


def _read_all(reader: ReaderStore, point: Point, *, quiet: bool) -> tuple[list[Damage], int]:
    damages: list[Damage] = []
    read_bytes = 0
    for shape in point.disks:
        with reader.open_view(point.position, shape.index) as view:
            total = sum(run.length for run in view.extents() if run.is_data)
            with progress_bytes(f"disk {shape.index}", total, quiet=quiet) as report:
                damages += view.find_damage(report)
            read_bytes += total
    return damages, read_bytes


def _row(damage: Damage) -> dict[str, Any]:
    return {
        "disk": damage.disk,
        "block": damage.block,
        "file": damage.file,
        "offset": damage.offset,
    }
