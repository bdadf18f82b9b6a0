"""What the lab proves, each on the files of a recovery point as anyone can read them."""

import json
import os
from dataclasses import dataclass

from appliance.applier.store import export
from appliance.cli.store_choice import find_machine, find_point
from deploy.lab.layout import Layout
from replication.errors import IntegrityError
from vsphere_emu.check import Copier, check_database, check_file_system
from vsphere_emu.workload.system import LogReport, check_log

PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Point:
    """A recovery point in the folder of points."""

    folder: str
    time_ns: int
    consistency: str
    changed_bytes: int

    @property
    def name(self) -> str:
        return os.path.basename(self.folder)

    def image(self, disk: int) -> str:
        return os.path.join(self.folder, f"disk{disk}.img")


def list_points(layout: Layout, machine: str) -> list[Point]:
    """The recovery points of a machine, oldest first; none while the applier has none."""
    folder = os.path.join(layout.points, machine)
    found = []
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    for name in names:
        path = os.path.join(folder, name)
        if name == "latest":
            continue
        try:
            with open(os.path.join(path, "point.json"), encoding="utf-8") as file:
                tree = json.load(file)
        except FileNotFoundError:
            continue  # thinned out since it was listed
        found.append(Point(path, tree["time_ns"], tree["consistency"], tree["changed_bytes"]))
    return sorted(found, key=lambda point: point.time_ns)


def data_bytes(path: str) -> int:
    """What a sparse file holds."""
    return os.stat(path).st_blocks * 512


def equals_source(image: str, source: str) -> int:
    """Compare every byte; returns how many. Raises IntegrityError naming the first that differs."""
    with open(image, "rb") as left, open(source, "rb") as right:
        compared = 0
        while True:
            mine, theirs = left.read(PIECE_BYTES), right.read(PIECE_BYTES)
            if mine != theirs:
                at = next(
                    (
                        n
                        for n, pair in enumerate(zip(mine, theirs, strict=False))
                        if pair[0] != pair[1]
                    ),
                    min(len(mine), len(theirs)),
                )
                raise IntegrityError(
                    f"{image} differs from {source} at byte {compared + at} "
                    f"(block {(compared + at) // 4096})"
                )
            if not mine:
                return compared
            compared += len(mine)


def is_clean(layout: Layout, image: str) -> None:
    """The file system of the image is clean once its journal is replayed, on a scratch copy."""
    check_file_system(image, layout.scratch, copy=_exporter(layout))


def opens_database(layout: Layout, data_image: str, wal_image: str) -> int:
    """PostgreSQL starts from the two disks; returns the sum on which pgbench's tables agree."""
    sums = check_database(data_image, wal_image, layout.scratch, copy=_exporter(layout))
    return sums.accounts


def has_whole_log(layout: Layout, image: str) -> int:
    """The log of the service in a root file system lacks no number; returns the last one."""
    found: list[LogReport] = []
    check_file_system(
        image,
        layout.scratch,
        lambda root: found.append(check_log(root)),
        copy=_exporter(layout),
    )
    if not found[0].last:
        raise IntegrityError(f"the service's log in {image} is empty")
    return found[0].last


def _exporter(layout: Layout) -> Copier:
    """Copies a disk of a point as ``understudy export`` does: its data alone, not its holes."""

    def copy(image: str, output: str) -> None:
        folder, file = os.path.split(image)
        machine, name = os.path.split(folder)
        reader = find_machine(layout.store, os.path.basename(machine))
        point = find_point(reader, name)
        disk = int(file.removeprefix("disk").removesuffix(".img"))
        with reader.open_view(point.position, disk) as view:
            export(view, output)

    return copy
