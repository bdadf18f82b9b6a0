"""A machine's points for those who only read: any process, without the writer's lock.

Opening a view races with a writer that merges and folds. The order makes it safe: take the pin,
then look at the catalogue, then open the files; a file that has gone meanwhile means that the
catalogue has changed, so look again.

Source: docs/STORE.md §6.
"""

from __future__ import annotations

import os
import time
import uuid
from typing import TYPE_CHECKING

from appliance.applier.store.base_image import BaseImage, base_folder, check_base
from appliance.applier.store.base_record import BaseRecord
from appliance.applier.store.catalogue import REBUILD_HINT, Chain, reading
from appliance.applier.store.layer_reader import Layer
from appliance.applier.store.pins import Pin
from appliance.applier.store.view import View
from replication.errors import ConfigError, IntegrityError, UnavailableError

if TYPE_CHECKING:
    from appliance.applier.store.model import Damage, Point

OPEN_TRIES_MAX = 50
RETRY_SECONDS = 0.02


def machine_folder(root: str, machine: uuid.UUID) -> str:
    return os.path.join(root, "machines", str(machine))


def machines_in(root: str) -> list[uuid.UUID]:
    """Machines of which the store at ``root`` holds something."""
    try:
        names = os.listdir(os.path.join(root, "machines"))
    except FileNotFoundError:
        return []
    found = []
    for name in sorted(names):
        try:
            machine = uuid.UUID(name)
        except ValueError:
            continue
        if os.path.exists(os.path.join(machine_folder(root, machine), "catalogue.sqlite")):
            found.append(machine)
    return found


class ReaderStore:
    """Read access to one machine; holds nothing open between calls."""

    def __init__(self, root: str, machine: uuid.UUID) -> None:
        self.machine = machine
        self.folder = machine_folder(root, machine)

    def chain(self) -> Chain:
        """One consistent look at layers and positions; ConfigError when there is no store."""
        try:
            with reading(os.path.join(self.folder, "catalogue.sqlite")) as catalogue:
                return catalogue.chain()
        except FileNotFoundError as error:
            raise ConfigError(
                f"the store holds nothing of machine {self.machine}: {self.folder}",
                hint="check the store's folder and the machine's id",
            ) from error

    @property
    def name(self) -> str:
        return self.chain().name

    def points(self) -> list[Point]:
        """Recovery points, oldest first: positions that a machine can be restored to."""
        return recovery_points(self.chain())

    def damages(self) -> list[Damage]:
        with reading(os.path.join(self.folder, "catalogue.sqlite")) as catalogue:
            return catalogue.damages()

    def open_view(self, position: int, disk: int) -> View:
        """One disk at a position.

        Raises ConfigError when there is no such position or disk, IntegrityError when a layer is
        unusable, UnavailableError when the base is just moving past the position.
        """
        self.chain()  # says so when there is no such machine, before a pin is tried
        missing: FileNotFoundError | None = None
        for _ in range(OPEN_TRIES_MAX):
            pin = Pin.take(os.path.join(self.folder, "pins"), position)
            try:
                chain = self.chain()
                point = self._point(chain, position)
                if chain.folding_to is None or position >= chain.folding_to:
                    return self._open(chain, point, disk, pin)
            except FileNotFoundError as error:
                pin.release()
                missing = error
            except BaseException:
                pin.release()
                raise
            else:
                pin.release()
            time.sleep(RETRY_SECONDS)
        if missing is not None:
            raise IntegrityError(
                f"the store of machine {self.machine} lacks {missing.filename}",
                hint="the file was removed from outside; a resync brings fresh data",
            )
        raise UnavailableError(
            f"position {position} of machine {self.machine} is being folded away",
            hint="choose a newer point",
        )

    def _point(self, chain: Chain, position: int) -> Point:
        point = chain.point(position)
        if point is None:
            raise ConfigError(
                f"machine {self.machine} has no position {position}",
                hint="list its points: thinning may have taken it",
            )
        return point

    def _open(self, chain: Chain, point: Point, disk: int, pin: Pin) -> View:
        shape = next((shape for shape in point.disks if shape.index == disk), None)
        if shape is None:
            raise ConfigError(
                f"machine {self.machine} has no disk {disk} at position {point.position}",
                hint=f"it has {', '.join(str(shape.index) for shape in point.disks)}",
            )
        record = BaseRecord.read(self.folder)
        if record is not None and record.reach > point.position:
            # The pin keeps a writer from this: the catalogue is not the one that goes with it.
            raise IntegrityError(
                f"position {point.position} of machine {self.machine} is no more: its base has "
                f"moved on to {record.reach}, of which the catalogue does not know",
                hint=f"the catalogue is an older one: {REBUILD_HINT}",
            )
        check_base(self.folder, record, disk)
        opened: list[Layer] = []
        base = BaseImage.open(base_folder(self.folder, disk))
        try:
            paths = [row.file for row in chain.layers if row.last <= point.position]
            opened.extend(Layer.open(os.path.join(self.folder, path)) for path in paths)
            return View(self.machine, self.folder, point, shape, base=base, layers=opened, pin=pin)
        except BaseException:
            for layer in opened:
                layer.close()
            if base is not None:
                base.close()
            raise


def recovery_points(chain: Chain) -> list[Point]:
    """Positions that a machine can be restored to, oldest first."""
    floor = chain.folding_to or 0
    return [
        point
        for point in chain.points
        if point.bookmark.consistency.restorable and point.position >= floor
    ]


def open_reader(root: str, machine: uuid.UUID) -> ReaderStore:
    """Read access to a machine of the store at ``root``."""
    return ReaderStore(root, machine)
