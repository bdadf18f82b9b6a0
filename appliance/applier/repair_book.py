"""Which blocks the source must send again, across restarts: ``repair.json``.

A request counts up whenever blocks are added; what is published always holds every run that is
still open. A manifest that says ``repaired`` >= a run's request says that the run's blocks have
come, so the run leaves the book if they have, and can be read; else it is asked for again.

Source: FORMAT.md §8.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from daemon.durable import storage_error, write_whole
from replication.block_set import block_count_of
from replication.bookmark import DiskShape
from replication.errors import IntegrityError
from replication.watermark import REPAIR_RUNS_MAX, Repair, RepairRun

REPAIR_FILE = "repair.json"


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run and the request that asked for it."""

    request: int
    run: RepairRun


class RepairBook:
    """The open repair requests of a machine; every change is on stable storage when it returns."""

    def __init__(self, folder: str) -> None:
        """Raise IntegrityError when the file there is not a repair book."""
        self._path = os.path.join(folder, REPAIR_FILE)
        self._request, self._open = _read(self._path)

    @property
    def open_runs(self) -> tuple[RepairRun, ...]:
        return tuple(item.run for item in self._open)

    @property
    def repair(self) -> Repair:
        """What the watermark says; no runs when there are too many to be said."""
        if not self._open or self.lost:
            return Repair(self._request)
        return Repair(self._request, self.open_runs)

    @property
    def lost(self) -> str:
        """Why repairs do not help any more, or empty."""
        if len(self._open) <= REPAIR_RUNS_MAX:
            return ""
        return f"{len(self._open)} runs of blocks need repair; one request holds {REPAIR_RUNS_MAX}"

    def ask(
        self, runs: Sequence[RepairRun], *, closing: Sequence[RepairRun] = ()
    ) -> tuple[RepairRun, ...]:
        """Open a request for what of ``runs`` is not asked for yet; return that.

        closing: runs that leave the book in the same step. Nothing is added once ``lost``.
        """
        gone = set(closing)
        left = tuple(item for item in self._open if item.run not in gone)
        fresh: tuple[RepairRun, ...] = ()
        if len(left) <= REPAIR_RUNS_MAX:
            fresh = tuple(_merged(run for run in runs if not _covers(left, run)))
        if fresh:
            self._request += 1
            left += tuple(OpenRun(self._request, run) for run in fresh)
        if left != self._open:
            self._keep(left)
        return fresh

    def ask_again(self, runs: Sequence[RepairRun] | None = None) -> None:
        """Ask for these runs, or for all that are open, under a new request.

        After a restart: the changeset that fulfilled the old one may have been applied and the
        book not yet been closed over it, and no other manifest would name that request again. Or
        after a manifest that says that blocks have come which have not.
        """
        again = set(self.open_runs if runs is None else runs)
        if again & set(self.open_runs):
            self._request += 1
            self._keep(
                tuple(
                    OpenRun(self._request, item.run) if item.run in again else item
                    for item in self._open
                )
            )

    def fulfilled(self, repaired: int) -> tuple[RepairRun, ...]:
        """The open runs that a changeset with this ``repaired`` carries.

        None for a request that was never made: whoever writes watermarks in our name must not
        close the book.
        """
        if repaired > self._request:
            return ()
        return tuple(item.run for item in self._open if item.request <= repaired)

    def fit(self, disks: Sequence[DiskShape]) -> None:
        """Drop what lies on no disk any more."""
        blocks = {disk.index: block_count_of(disk.size_bytes) for disk in disks}
        outside = [run for run in self.open_runs if run.block + run.count > blocks.get(run.disk, 0)]
        self.ask((), closing=outside)

    def _keep(self, runs: tuple[OpenRun, ...]) -> None:
        tree = {
            "request": self._request,
            "runs": [
                [item.request, item.run.disk, item.run.block, item.run.count] for item in runs
            ],
        }
        write_whole(self._path, json.dumps(tree, separators=(",", ":")).encode())
        self._open = runs


def _covers(runs: Iterable[OpenRun], run: RepairRun) -> bool:
    return any(
        item.run.disk == run.disk
        and item.run.block <= run.block
        and run.block + run.count <= item.run.block + item.run.count
        for item in runs
    )


def _merged(runs: Iterable[RepairRun]) -> list[RepairRun]:
    """The same blocks in as few runs as possible."""
    merged: list[RepairRun] = []
    for run in sorted(runs, key=lambda run: (run.disk, run.block)):
        last = merged[-1] if merged else None
        if last and last.disk == run.disk and run.block <= last.block + last.count:
            end = max(last.block + last.count, run.block + run.count)
            merged[-1] = RepairRun(run.disk, last.block, end - last.block)
        else:
            merged.append(run)
    return merged


def _read(path: str) -> tuple[int, tuple[OpenRun, ...]]:
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        return 0, ()
    except OSError as error:
        raise storage_error("read", path, error) from error
    try:
        tree = json.loads(raw)
        runs = tuple(
            OpenRun(int(request), RepairRun(int(disk), int(block), int(count)))
            for request, disk, block, count in tree["runs"]
        )
        return int(tree["request"]), runs
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path} is not a record of repair requests: {error}",
            hint="move it away; a verify of the newest point finds again what needs repair",
        ) from error
