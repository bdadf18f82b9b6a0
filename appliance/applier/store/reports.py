"""What readers of a store found damaged, for the applier that owns it: files in ``reported/``.

A reader may not change the store, but it can leave a file. The applier looks at the blocks itself
before it believes any of it.
"""

import json
import os
import secrets
from collections.abc import Iterable

from appliance.applier.store.model import Damage
from daemon.durable import make_folder, storage_error, write_whole
from replication.frame import DISK_COUNT_MAX
from replication.watermark import RepairRun

REPORTED_FOLDER = "reported"
REPORTS_MAX = 64
REPORTED_BLOCKS_MAX = 4096
"""In one report; whoever finds more orders a resync."""

_SUFFIX = ".json"
_BYTES_MAX = 1 << 20


def report_damage(folder: str, damages: Iterable[Damage]) -> None:
    """Leave a report in a machine's folder. Raises StorageError where that is not allowed."""
    blocks = [[damage.disk, damage.block] for damage in damages if damage.disk >= 0]
    path = os.path.join(folder, REPORTED_FOLDER)
    make_folder(path)
    name = f"{secrets.token_hex(8)}{_SUFFIX}"
    tree = {"blocks": blocks[:REPORTED_BLOCKS_MAX]}
    write_whole(os.path.join(path, name), json.dumps(tree).encode())


def read_reports(folder: str) -> tuple[list[str], list[RepairRun]]:
    """Paths of the reports that are there, and what they name; senseless ones name nothing."""
    path = os.path.join(folder, REPORTED_FOLDER)
    try:
        names = sorted(name for name in os.listdir(path) if name.endswith(_SUFFIX))[:REPORTS_MAX]
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise storage_error("list", path, error) from error
    paths = [os.path.join(path, name) for name in names]
    return paths, [run for one in paths for run in _read(one)]


def drop_reports(paths: Iterable[str]) -> None:
    """After what they name was looked at."""
    for path in paths:
        try:
            os.unlink(path)
        except OSError as error:
            raise storage_error("delete", path, error) from error


def _read(path: str) -> list[RepairRun]:
    try:
        with open(path, "rb") as file:
            tree = json.loads(file.read(_BYTES_MAX))
        found = [RepairRun(int(disk), int(block), 1) for disk, block in tree["blocks"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [
        run
        for run in found[:REPORTED_BLOCKS_MAX]
        if run.block >= 0 and 0 <= run.disk < DISK_COUNT_MAX
    ]
