"""What an applier is told: its store, the cache it reads, the machines it owns and their keys."""

import os
import stat
import uuid
from typing import Annotated, Self

from pydantic import Field, SecretStr, model_validator

from appliance.applier.cache_account import API_VERSION_DEFAULT, CacheAccount
from appliance.applier.folder_account import FolderAccount
from appliance.applier.retention import RetentionPolicy
from daemon.config import DaemonConfig, Section
from daemon.control_config import ControlConfig
from daemon.service import ServiceConfig
from replication.errors import ConfigError
from replication.manifest import SEGMENT_BYTES_MAX

SECRET_FILE_BYTES_MAX = 16 << 10
MACHINE_COUNT_MAX = 1024
_MIB = 1 << 20

Positive = Annotated[float, Field(gt=0)]


class Cache(Section):
    """Where changesets come from: a storage account, or a folder laid out like one.

    api_version: of the Azure storage services, ``YYYY-MM-DD``.
    """

    connection_string: SecretStr | None = None
    connection_string_file: str | None = None
    api_version: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = API_VERSION_DEFAULT
    folder: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = (self.connection_string, self.connection_string_file, self.folder)
        if sum(item is not None for item in given) != 1:
            raise ValueError("give one of connection_string, connection_string_file and folder")
        return self

    def open(self) -> CacheAccount:
        """The account; nothing is asked of it yet. Raises ConfigError."""
        if self.folder is not None:
            return FolderAccount(os.path.abspath(self.folder))
        if self.connection_string is not None:
            text = self.connection_string.get_secret_value()
        else:
            assert self.connection_string_file is not None
            text = read_secret(self.connection_string_file, "cache.connection_string_file")
        # Importing Azure's library takes longer than all the rest, and a folder needs none of it.
        from appliance.applier.azure_account import AzureAccount  # noqa: PLC0415

        return AzureAccount(text.strip(), self.api_version)


class Machine(Section):
    """A protected machine that this applier applies.

    data_key_file: 64 hexadecimal digits in a file that none but its owner can read
                   (daemon/data_key.py).
    """

    id: uuid.UUID
    name: Annotated[str, Field(min_length=1, max_length=255)]
    data_key_file: str


class ApplierConfig(DaemonConfig):
    """The root of an applier's configuration.

    machines:     whom it applies, unless a config server says that.
    store:        folder of the machines' layered stores.
    points_mount: folder where every recovery point is served as read-only files; none: nowhere.
    points_for_root: root may read them too, as a compute node does.
    fetches_max:  segments fetched at once, all machines together.
    fetch_bytes_max: their bytes in memory.
    applies_max:  changesets applied at once, each of another machine.
    sweep_seconds: between two looks for manifests that no message told of.
    wake_seconds: between two looks into the queue.
    reask_seconds: first wait before a missing blob is tried again; doubles from time to time.
    gap_seconds_max: how long missing blobs are asked for before the stream is called lost.
    disk_bytes_max: of a disk that a machine declares; one with a larger disk is not applied.
    machine_space_bytes_max: that a machine's store may take before nothing more is applied.
    points_seconds: between two looks at whether the config server has to hear of other points.
    scrub_bytes_per_second: of the newest point, re-read against its digests; 0: never.
    """

    store: Annotated[str, Field(min_length=1)]
    cache: Cache
    machines: Annotated[tuple[Machine, ...], Field(max_length=MACHINE_COUNT_MAX)] = ()
    control: ControlConfig | None = None
    retention: RetentionPolicy = RetentionPolicy()
    points_mount: str | None = None
    points_for_root: bool = False
    fetches_max: Annotated[int, Field(ge=1, le=64)] = 8
    fetch_bytes_max: Annotated[int, Field(ge=SEGMENT_BYTES_MAX, le=1024 * _MIB)] = 32 * _MIB
    applies_max: Annotated[int, Field(ge=1, le=16)] = 2
    sweep_seconds: Positive = 5.0
    wake_seconds: Positive = 1.0
    reask_seconds: Positive = 10.0
    gap_seconds_max: Positive = 900.0
    points_seconds: Positive = 60.0
    scrub_bytes_per_second: Annotated[int, Field(ge=0)] = 8 * _MIB
    disk_bytes_max: Annotated[int, Field(ge=1)] = 64 << 40
    machine_space_bytes_max: Annotated[int, Field(ge=1)] | None = None
    service: ServiceConfig = ServiceConfig()

    @model_validator(mode="after")
    def _one_authority(self) -> Self:
        if bool(self.machines) == (self.control is not None):
            raise ValueError("give either [[machines]] or [control]")
        return self

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for what, found in (
            ("id", [str(machine.id) for machine in self.machines]),
            ("name", [machine.name for machine in self.machines]),
        ):
            if len(set(found)) != len(found):
                raise ValueError(f"machines: an {what} is there twice")
        return self


def read_secret(path: str, where: str) -> str:
    """The text of a file that its owner alone can read; ConfigError otherwise."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(SECRET_FILE_BYTES_MAX)
    except OSError as error:
        raise ConfigError(f"{where}: cannot read {path}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"{where}: others than its owner can reach {path} (mode {stat.S_IMODE(mode):04o})",
            hint=f"chmod 600 {path}",
        )
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: {path} is not text") from error
