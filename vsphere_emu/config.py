"""What the vSphere emulator is told: a datastore, guests with disks and workloads, a vCenter."""

import ipaddress
import os
import re
import stat
import uuid
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator

from daemon.config import DaemonConfig, Section
from daemon.service import ServiceConfig
from replication.errors import ConfigError

DISK_BYTES_MIN = 1 << 20
SYNTHETIC_COUNT_MAX = 10_000
PASSWORD_CHARS_MAX = 1024
_NAMESPACE = uuid.UUID("3c1c0f0e-5b57-4d6e-8a55-6f1a3a0b9f21")
FileSystem = Literal["ext4", "xfs", "btrfs", "none"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: letters, digits, '-', '_', '.', at most 63")
    return name


def _address(text: str) -> str:
    return str(ipaddress.ip_address(text))


def _folder(path: str) -> str:
    if path and any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path!r} is no path of folders, such as Production/Web")
    return path


Name = Annotated[str, AfterValidator(_name)]
Address = Annotated[str, AfterValidator(_address)]
FolderPath = Annotated[str, AfterValidator(_folder)]
Mac = Annotated[str, Field(pattern=r"^([0-9a-f]{2}:){5}[0-9a-f]{2}$")]


class DatastoreConfig(Section):
    """A datastore: ``[name] folder/file.vmdk`` stands for a file below ``folder``."""

    name: Name = "datastore1"
    folder: str


class DiskConfig(Section):
    """A guest's disk: ``[datastore] guest/name.vmdk``, a file system on the whole of it.

    image: what the disk is at first: a copy of this disk image, which has a partition table, and
        ``file_system`` on its first partition. Without one, the disk is empty at first.
    mount_point: the folder in the guest's own folder; the disk's name if absent.
    mount_options: as ``mount -o`` takes them.
    """

    name: Name
    size_bytes: Annotated[int, Field(ge=DISK_BYTES_MIN, multiple_of=4096)]
    file_system: FileSystem = "none"
    mount_point: Name | None = None
    mount_options: str = "noatime"
    image: str | None = None

    @model_validator(mode="after")
    def _image_is_mounted(self) -> Self:
        if self.image is not None and self.file_system == "none":
            raise ValueError(f"disk {self.name}: say which file_system the image's partition has")
        return self


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


class SystemWorkload(Section):
    """The disk of a machine that boots: what its own service would write, each line with fsync."""

    kind: Literal["system"]
    disk: Name
    writes_per_second: Annotated[float, Field(gt=0, le=10_000)] = 50.0


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


Workload = Annotated[
    WebWorkload | FilesWorkload | PgbenchWorkload | SystemWorkload, Field(discriminator="kind")
]


class AdapterConfig(Section):
    """A guest's network adapter, as the vCenter tells of it; no packet ever flows.

    mac: made up by the vCenter if absent.
    """

    network: Name = "production"
    mac: Mac | None = None
    addresses: tuple[Address, ...] = ()


class GuestConfig(Section):
    """A virtual machine: disks and what it does with them.

    bios_uuid:    by which an agent in it is recognised; made of the name if absent.
    guest_system: one of vSphere's identifiers, VirtualMachineGuestOsIdentifier.
    hostname:     the guest's own; its name if empty.
    folder:       where in the datacenter it is: ``Production/Web``.
    adapters:     network adapters.
    """

    name: Name
    disks: Annotated[tuple[DiskConfig, ...], Field(min_length=1, max_length=16)]
    workload: Workload | None = None
    bios_uuid: uuid.UUID | None = None
    guest_system: Name = "debian12_64Guest"
    hostname: str = ""
    folder: FolderPath = ""
    adapters: Annotated[tuple[AdapterConfig, ...], Field(max_length=8)] = ()

    @property
    def identity(self) -> uuid.UUID:
        """The BIOS UUID: the one that is given, else one that follows from the name."""
        return self.bios_uuid or uuid.uuid5(_NAMESPACE, f"guest {self.name}")

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


class Tls(Section):
    """Certificate chain and private key (PEM files) of the vCenter."""

    certificate: str
    key: str


class VCenterConfig(Section):
    """The vCenter that ``serve`` plays; another one is another process with another file.

    password, password_file: one of the two; the file is for its owner alone.
    instance_uuid: by which vCenters are told apart; made of name, host and port if absent.
    tls:           one is made, signed by itself, in ``root_folder/vcenter`` if absent.
    session_idle_seconds: after which a session that asks nothing has to log in again.
    synthetic_count: VMs without content that are there besides the guests.
    """

    name: Name = "vcenter"
    host: Address = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8989
    user: Annotated[str, Field(min_length=1, max_length=255)] = "administrator@vsphere.local"
    password: SecretStr | None = None
    password_file: str | None = None
    instance_uuid: uuid.UUID | None = None
    tls: Tls | None = None
    datacenter: Name = "DC0"
    esx_hosts: Annotated[tuple[Name, ...], Field(min_length=1, max_length=32)] = ("esx-01",)
    session_idle_seconds: Annotated[int, Field(ge=1, le=86400)] = 1800
    synthetic_count: Annotated[int, Field(ge=0, le=SYNTHETIC_COUNT_MAX)] = 0

    @model_validator(mode="after")
    def _one_password(self) -> Self:
        if (self.password is None) == (self.password_file is None):
            raise ValueError("give either password or password_file")
        return self

    @property
    def identity(self) -> uuid.UUID:
        """The instance UUID: the one that is given, else one that stays over restarts."""
        told = f"vcenter {self.name} {self.host} {self.port}"
        return self.instance_uuid or uuid.uuid5(_NAMESPACE, told)

    def read_password(self) -> str:
        """The password. Raises ConfigError for a file that is absent, empty or open to others."""
        if self.password is not None:
            return self.password.get_secret_value()
        assert self.password_file is not None
        return _read_private(self.password_file)


class Config(DaemonConfig):
    """The emulator's configuration file.

    root_folder: where the guests' mounts, logs and process files live.
    """

    root_folder: str
    datastore: DatastoreConfig
    guests: tuple[GuestConfig, ...]
    vcenter: VCenterConfig | None = None
    service: ServiceConfig = ServiceConfig()

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


def _read_private(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(PASSWORD_CHARS_MAX).strip()
    except OSError as error:
        raise ConfigError(f"cannot read the password file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the password file {path} is not text") from error
    if mode & 0o077:
        raise ConfigError(
            f"the password file {path} has mode {mode:04o}, others could read it",
            hint=f"chmod 600 {path}",
        )
    if not content:
        raise ConfigError(f"the password file {path} is empty")
    return content
