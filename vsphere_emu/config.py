"""What the vSphere emulator is told: a datastore, and guests with disks and workloads."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from daemon.config import DaemonConfig, Section
from replication.errors import ConfigError

DISK_BYTES_MIN = 1 << 20
FileSystem = Literal["ext4", "xfs", "btrfs", "none"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: letters, digits, '-', '_', '.', at most 63")
    return name


Name = Annotated[str, AfterValidator(_name)]


class DatastoreConfig(Section):
    """A datastore: ``[name] folder/file.vmdk`` stands for a file below ``folder``."""

    name: Name = "datastore1"
    folder: str


class DiskConfig(Section):
    """A guest's disk: ``[datastore] guest/name.vmdk``, a file system on the whole of it.

    mount_point: the folder in the guest's own folder; the disk's name if absent.
    mount_options: as ``mount -o`` takes them.
    """

    name: Name
    size_bytes: Annotated[int, Field(ge=DISK_BYTES_MIN, multiple_of=4096)]
    file_system: FileSystem = "none"
    mount_point: Name | None = None
    mount_options: str = "noatime"


class WebWorkload(Section):
    """Small files written, rewritten and appended, each with fsync."""

    kind: Literal["web"]
    disk: Name
    writes_per_second: Annotated[float, Field(gt=0, le=10_000)] = 50.0


class FilesWorkload(Section):
    """Files created, renamed, punched and deleted, and the file system trimmed."""

    kind: Literal["files"]
    disk: Name
    changes_per_second: Annotated[float, Field(gt=0, le=10_000)] = 30.0
    trim_interval_seconds: Annotated[float, Field(gt=0)] = 5.0


class PgbenchWorkload(Section):
    """PostgreSQL under pgbench: data on one disk, write-ahead log on another.

    scale: of ``pgbench -i``, about 16 MB each.
    transactions_per_second: at most; as many as the machine does if absent.
    """

    kind: Literal["pgbench"]
    data_disk: Name
    wal_disk: Name
    scale: Annotated[int, Field(ge=1, le=1000)] = 5
    clients: Annotated[int, Field(ge=1, le=64)] = 4
    transactions_per_second: Annotated[float, Field(gt=0)] | None = None

    @property
    def disks(self) -> tuple[str, str]:
        """The names of the disks that the workload writes to."""
        return (self.data_disk, self.wal_disk)


Workload = Annotated[WebWorkload | FilesWorkload | PgbenchWorkload, Field(discriminator="kind")]


class GuestConfig(Section):
    """A virtual machine: disks and what it does with them."""

    name: Name
    disks: Annotated[tuple[DiskConfig, ...], Field(min_length=1, max_length=16)]
    workload: Workload | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [disk.name for disk in self.disks]
        points = [disk.mount_point or disk.name for disk in self.disks]
        if len(set(names)) < len(names) or len(set(points)) < len(points):
            raise ValueError(f"guest {self.name}: two disks share a name or a mount point")
        mounted = {disk.name for disk in self.disks if disk.file_system != "none"}
        if self.workload is not None:
            used = (
                self.workload.disks
                if isinstance(self.workload, PgbenchWorkload)
                else (self.workload.disk,)
            )
            if missing := set(used) - mounted:
                raise ValueError(
                    f"guest {self.name}: the workload needs a disk with a file system named "
                    f"{', '.join(sorted(missing))}"
                )
        return self


class Config(DaemonConfig):
    """The emulator's configuration file.

    root_folder: where the guests' mounts, logs and process files live.
    """

    root_folder: str
    datastore: DatastoreConfig
    guests: tuple[GuestConfig, ...]

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        names = [guest.name for guest in self.guests]
        if len(set(names)) < len(names):
            raise ValueError("two guests share a name")
        return self

    def select(self, names: tuple[str, ...]) -> tuple[GuestConfig, ...]:
        """The guests of those names, all if none is given. Raises ConfigError for others."""
        known = {guest.name: guest for guest in self.guests}
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"there is no guest {name}", hint=f"the guests are {', '.join(known)}"
                )
        return tuple(known[name] for name in names) or self.guests
