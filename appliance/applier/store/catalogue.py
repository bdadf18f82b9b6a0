"""The catalogue of one machine: SQLite beside the layers, one transaction per visible change.

It says which layers form the chain, which positions can be viewed and what is damaged. Layers and
``base.json`` say the same, so it can be rebuilt. The writer has one connection; readers open their
own, ask and close.

Source: docs/STORE.md §5.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import sqlite3
import tempfile
import threading
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from appliance.applier.store.layer_format import shapes_from_json, shapes_to_json
from appliance.applier.store.model import Damage, Head, LayerRow, Point
from daemon.durable import storage_error
from replication.bookmark import Bookmark, Consistency, Stamp
from replication.errors import IntegrityError, StorageError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from replication.bookmark import DiskShape

SCHEMA_VERSION = 1
BUSY_SECONDS_MAX = 30
SHAPES_REMEMBERED_MAX = 1024
SPACE_BYTES_MIN = 1 << 20
"""With less than this a log and its index may not be made."""

_MEMORY = "/dev/shm"  # noqa: S108 - a folder in memory, and a new one of our own in it
_NO_SPACE = os.strerror(errno.ENOSPC)
REBUILD_HINT = "move it away, with its -wal and -shm: the applier makes a new one from the layers"
_SCHEMA = """
CREATE TABLE machine (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    machine TEXT NOT NULL, name TEXT NOT NULL,
    base_position INTEGER NOT NULL, folding_to INTEGER
) STRICT;
CREATE TABLE layer (
    first INTEGER PRIMARY KEY, last INTEGER NOT NULL UNIQUE, file TEXT NOT NULL UNIQUE,
    size_bytes INTEGER NOT NULL, extent_count INTEGER NOT NULL, CHECK (first <= last)
) STRICT;
CREATE TABLE point (
    position INTEGER PRIMARY KEY, generation INTEGER NOT NULL, number INTEGER NOT NULL,
    time_ns INTEGER NOT NULL, consistency TEXT NOT NULL, reason TEXT NOT NULL,
    attempt BLOB NOT NULL, applied_ns INTEGER NOT NULL, changed_bytes INTEGER NOT NULL,
    verified_ns INTEGER, disks TEXT NOT NULL
) STRICT;
CREATE TABLE damage (
    file TEXT NOT NULL, offset INTEGER NOT NULL, disk INTEGER NOT NULL, block INTEGER NOT NULL,
    expected BLOB NOT NULL, found_ns INTEGER NOT NULL, PRIMARY KEY (file, offset)
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Chain:
    """One consistent look at the catalogue.

    folding_to: position that the base is on its way to; positions before it cannot be opened.
    layers:     oldest first, without a gap from ``base_position + 1``.
    """

    machine: uuid.UUID
    name: str
    base_position: int
    folding_to: int | None
    layers: tuple[LayerRow, ...]
    points: tuple[Point, ...]

    def point(self, position: int) -> Point | None:
        return next((point for point in self.points if point.position == position), None)


class Catalogue:
    """An open catalogue; calls from several threads take turns."""

    def __init__(self, path: str, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.RLock()

    @classmethod
    def create(cls, path: str, machine: uuid.UUID, name: str, base_position: int) -> Catalogue:
        """A new one at ``path``, which must not exist."""
        made = cls(path, _connect(path, "rwc"))
        with made._transaction():
            for statement in _SCHEMA.split(";"):
                made._run(statement)
            made._run(f"PRAGMA user_version = {SCHEMA_VERSION}")
            made._run(
                "INSERT INTO machine VALUES (1, ?, ?, ?, NULL)", str(machine), name, base_position
            )
        return made

    @classmethod
    def open(cls, path: str) -> Catalogue:
        """Raises FileNotFoundError when there is none, IntegrityError when it is unreadable."""
        if not os.path.exists(path):
            raise FileNotFoundError(path)
        made = cls(path, _connect(path, "rw"))
        try:
            made._check_version()
        except BaseException:
            made.close()
            raise
        return made

    def _check_version(self) -> None:
        (version,) = self._run("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            raise IntegrityError(
                f"the catalogue {self.path} has version {version}, not {SCHEMA_VERSION}",
                hint=REBUILD_HINT,
            )

    @property
    def machine(self) -> uuid.UUID:
        return uuid.UUID(self._run("SELECT machine FROM machine").fetchone()[0])

    def chain(self) -> Chain:
        with self._transaction():
            machine, name, base_position, folding_to = self._run(
                "SELECT machine, name, base_position, folding_to FROM machine"
            ).fetchone()
            layers = self._run(
                "SELECT first, last, file, size_bytes, extent_count FROM layer ORDER BY first"
            ).fetchall()
            points = self._run("SELECT * FROM point ORDER BY position").fetchall()
        return Chain(
            machine=uuid.UUID(machine),
            name=name,
            base_position=base_position,
            folding_to=folding_to,
            layers=tuple(LayerRow(*row) for row in layers),
            points=tuple(_point(row) for row in points),
        )

    def head(self) -> Head | None:
        point = self.newest()
        if point is None:
            return None
        return Head(point.position, point.bookmark.stamp, point.attempt, point.applied_ns)

    def newest(self) -> Point | None:
        row = self._run("SELECT * FROM point ORDER BY position DESC LIMIT 1").fetchone()
        return _point(row) if row else None

    def add(self, layer: LayerRow, point: Point) -> None:
        """A sealed layer and the point that it ends in."""
        with self._transaction():
            self._insert_layer(layer)
            self._insert_point(point)

    def add_base(self, point: Point) -> None:
        with self._transaction():
            self._insert_point(point)

    def replace(self, merged: LayerRow, changed_bytes: int, damages: Sequence[Damage]) -> None:
        """One layer for all that lie within it; points inside it are gone."""
        inside = (merged.first, merged.last)
        with self._transaction():
            self._run(
                "DELETE FROM damage WHERE file IN"
                " (SELECT file FROM layer WHERE first >= ? AND last <= ?)",
                *inside,
            )
            self._run("DELETE FROM layer WHERE first >= ? AND last <= ?", *inside)
            self._insert_layer(merged)
            self._run("DELETE FROM point WHERE position >= ? AND position < ?", *inside)
            self._run(
                "UPDATE point SET changed_bytes = ?, verified_ns = NULL WHERE position = ?",
                changed_bytes,
                merged.last,
            )
            self._insert_damages(damages)

    def rename(self, name: str) -> None:
        with self._transaction():
            self._run("UPDATE machine SET name = ?", name)

    def intend_fold(self, position: int | None) -> None:
        with self._transaction():
            self._run("UPDATE machine SET folding_to = ?", position)

    def folded(self, layer: LayerRow, damages: Sequence[Damage], gone: Sequence[Damage]) -> None:
        """The base is at the layer's last position; the layer and older points are gone, and so are
        the damages in the base that it has overwritten.
        """
        with self._transaction():
            for damage in gone:
                self._delete_damage(damage.file, damage.offset)
            self._run("UPDATE machine SET base_position = ?, folding_to = NULL", layer.last)
            self._run("DELETE FROM damage WHERE file = ?", layer.file)
            self._run("DELETE FROM layer WHERE first = ?", layer.first)
            self._run("DELETE FROM point WHERE position < ?", layer.last)
            self._insert_damages(damages)

    def verified(self, position: int, time_ns: int) -> None:
        with self._transaction():
            self._run("UPDATE point SET verified_ns = ? WHERE position = ?", time_ns, position)

    def damages(self) -> list[Damage]:
        rows = self._run(
            "SELECT disk, block, file, offset, expected, found_ns FROM damage"
            " ORDER BY disk, block, file, offset"
        ).fetchall()
        return [Damage(*row) for row in rows]

    def add_damages(self, damages: Sequence[Damage]) -> None:
        with self._transaction():
            self._insert_damages(damages)

    def remove_damage(self, file: str, offset: int) -> None:
        with self._transaction():
            self._delete_damage(file, offset)

    def _delete_damage(self, file: str, offset: int) -> None:
        self._run("DELETE FROM damage WHERE file = ? AND offset = ?", file, offset)

    def _insert_layer(self, layer: LayerRow) -> None:
        self._run(
            "INSERT INTO layer VALUES (?, ?, ?, ?, ?)",
            layer.first,
            layer.last,
            layer.file,
            layer.size_bytes,
            layer.extent_count,
        )

    def _insert_point(self, point: Point) -> None:
        bookmark = point.bookmark
        self._run(
            "INSERT INTO point VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            point.position,
            bookmark.stamp.generation,
            bookmark.stamp.number,
            bookmark.time_ns,
            bookmark.consistency.value,
            bookmark.reason,
            point.attempt,
            point.applied_ns,
            point.changed_bytes,
            point.verified_ns,
            json.dumps(shapes_to_json(point.disks)),
        )

    def _insert_damages(self, damages: Sequence[Damage]) -> None:
        for damage in damages:
            self._run(
                "INSERT OR REPLACE INTO damage VALUES (?, ?, ?, ?, ?, ?)",
                damage.file,
                damage.offset,
                damage.disk,
                damage.block,
                damage.expected,
                damage.found_ns,
            )

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        with self._lock:
            try:
                return self._connection.execute(statement, values)
            except sqlite3.Error as error:
                raise _told(self.path, error) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._run("BEGIN")
            try:
                yield
                self._run("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def reading(path: str) -> Iterator[Catalogue]:
    """The catalogue for one question, also when its disk has no room for the log that SQLite needs.

    It is read from a copy in memory then. A writer that moves its log into it meanwhile may tear
    the copy, which shows as damage: whoever asks asks again.
    """
    try:
        catalogue = Catalogue.open(path)
    except StorageError:
        with tempfile.TemporaryDirectory(dir=_MEMORY if os.path.isdir(_MEMORY) else None) as folder:
            copy = os.path.join(folder, os.path.basename(path))
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(path + suffix, copy + suffix)
            with Catalogue.open(copy) as found:
                yield found
        return
    with catalogue:
        yield catalogue


def _connect(path: str, mode: str) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(
            f"file:{os.path.abspath(path).replace('%', '%25').replace('?', '%3f')}?mode={mode}",
            uri=True,
            timeout=BUSY_SECONDS_MAX,
            isolation_level=None,
            check_same_thread=False,
        )
    except sqlite3.Error as error:
        raise _told(path, error) from error
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error as error:
        connection.close()
        raise _told(path, error) from error
    return connection


def _told(path: str, error: sqlite3.Error) -> Exception:
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return UnavailableError(f"the catalogue {path} is busy: {error}", hint="try again")
    if code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return IntegrityError(f"the catalogue {path} is damaged: {error}", hint=REBUILD_HINT)
    if code == sqlite3.SQLITE_FULL or _is_full(os.path.dirname(path)):
        # It says that it cannot open the file, where it cannot make the log beside it.
        return storage_error(
            "use the catalogue", path, OSError(errno.ENOSPC, f"{_NO_SPACE}: {error}")
        )
    return StorageError(f"cannot use the catalogue {path}: {error}")


def _is_full(folder: str) -> bool:
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < SPACE_BYTES_MIN


@functools.lru_cache(maxsize=SHAPES_REMEMBERED_MAX)
def _shapes(text: str) -> tuple[DiskShape, ...]:
    """Most points of a machine have the same disks."""
    return shapes_from_json(json.loads(text))


def _point(row: tuple[Any, ...]) -> Point:
    return Point(
        position=row[0],
        bookmark=Bookmark(Stamp(row[1], row[2]), row[3], Consistency(row[4]), row[5]),
        attempt=row[6],
        applied_ns=row[7],
        changed_bytes=row[8],
        verified_ns=row[9],
        disks=_shapes(row[10]),
    )
