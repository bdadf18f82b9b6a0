"""What the mobility agent can be told."""

import os
from typing import Annotated, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import AfterValidator, Field, model_validator

from agents.mobility.leave import AT_ONCE, check_leave
from daemon.config import DaemonConfig, Section
from daemon.data_key import read_data_key
from daemon.service import ServiceConfig
from daemon.tls import TlsFiles
from replication.bookmark import DiskShape
from replication.frame import DISK_COUNT_MAX
from replication.manifest import SEGMENT_BYTES_MAX

Seconds = Annotated[float, Field(gt=0, le=86400)]


def _https_origin(url: str) -> str:
    wrong = ValueError("an https URL without a path is expected, as https://appliance:9443")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise wrong from error
    bare = f"https://{parts.netloc}"
    if url.rstrip("/") != bare or not parts.hostname or "@" in bare or port == 0:
        raise wrong
    return bare


HttpsOrigin = Annotated[str, AfterValidator(_https_origin)]
"""An https URL without a path."""


class DiskConfig(Section):
    """A disk to protect.

    index:  the disk's number in the stream; never give an old number to another disk.
    device: a whole block device.
    name:   what people call it; the device's path if not given.
    """

    index: int = Field(ge=0, lt=DISK_COUNT_MAX)
    device: str
    name: str = Field(default="", max_length=255)

    def shape(self, size_bytes: int) -> DiskShape:
        return DiskShape(self.index, self.name or self.device, size_bytes)


class CaptureConfig(Section):
    """How changes become points.

    interval_seconds:     shortest time between changesets while there is churn.
    heartbeat_seconds:    longest time without a bookmark.
    pause_share_max:      largest share of the time that file systems may be frozen.
    freeze_bytes_max:     pre-copy rounds go on until no more than this is left.
    rounds_max:           pre-copy rounds at most.
    freeze_seconds_max:   the watchdog thaws after this, whatever happens.
    changeset_bytes_max:  more than this is cut into several changesets, without a point.
    audit_chunks:         64 KiB chunks whose digests go with each changeset, disks taken in turn.
    raw_capture:          how a disk without a mounted file system gets a point: when a round
                          finds it quiet, or by FICLONE of its image where the store can.
    compare_share_max:    largest share of the time that a resync reads and compares disks.
    """

    interval_seconds: Seconds = 5.0
    heartbeat_seconds: Seconds = 60.0
    pause_share_max: float = Field(default=0.01, gt=0, le=1)
    freeze_bytes_max: int = Field(default=32 << 20, ge=1 << 20, le=256 << 20)
    rounds_max: int = Field(default=6, ge=1, le=100)
    freeze_seconds_max: float = Field(default=2.0, gt=0, le=60)
    changeset_bytes_max: int = Field(default=256 << 20, ge=16 << 20, le=1 << 34)
    audit_chunks: int = Field(default=8, ge=0, le=1024)
    raw_capture: Literal["quiet", "reflink"] = "quiet"
    compare_share_max: float = Field(default=0.5, gt=0, le=1)


class AppConsistencyConfig(Section):
    """Points for which the applications' own scripts bring their data to rest.

    interval_seconds: 0: off.
    pre, post:        executables, run in this order before the freeze and after the thaw.
    """

    interval_seconds: float = Field(default=0, ge=0)
    pre: tuple[str, ...] = ()
    post: tuple[str, ...] = ()
    script_seconds_max: Seconds = 60.0


class SendConfig(Section):
    """How segments travel.

    bandwidth_bytes_per_second_max: 0: no limit.
    """

    segment_bytes: int = Field(default=6 << 20, ge=2 << 20, le=SEGMENT_BYTES_MAX - (2 << 20))
    segments_in_flight_max: int = Field(default=3, ge=1, le=32)
    bandwidth_bytes_per_second_max: int = Field(default=0, ge=0)
    zstd_level: int = Field(default=1, ge=1, le=19)
    request_seconds_max: Seconds = 60.0
    backoff_seconds_max: Seconds = 15.0


class AgentSettings(DaemonConfig):
    """What an agent is told in its file, whoever says what it replicates.

    state_folder:   where block sets and positions are kept; not on a protected disk.
    tracker:        ``ebpf``, or ``scan`` where that cannot be had (no points in time).
    resync:         when one that is necessary may begin, without a config server: ``at once``, or
                    ``window 22:00-06:00`` by the machine's own time.
    """

    state_folder: str
    tracker: Literal["ebpf", "scan"] = "ebpf"
    resync: Annotated[str, AfterValidator(check_leave)] = AT_ONCE
    capture: CaptureConfig = CaptureConfig()
    app_consistency: AppConsistencyConfig = AppConsistencyConfig()
    send: SendConfig = SendConfig()
    service: ServiceConfig = ServiceConfig()


class AgentConfig(AgentSettings):
    """The whole configuration of ``understudy-agent`` without a config server.

    process_server: https URL of the process server, without a path.
    """

    machine: UUID
    name: str = Field(default="", max_length=255)
    data_key_file: str
    process_server: HttpsOrigin
    tls: TlsFiles
    disks: tuple[DiskConfig, ...] = Field(min_length=1, max_length=DISK_COUNT_MAX)

    @model_validator(mode="after")
    def _disks_differ(self) -> "AgentConfig":
        devices = {os.path.realpath(disk.device) for disk in self.disks}
        for what, values in (("index", {disk.index for disk in self.disks}), ("device", devices)):
            if len(values) != len(self.disks):
                raise ValueError(f"two disks have the same {what}")
        return self

    def data_key(self) -> bytes:
        """Read the data key; raise ConfigError when others can read it or it is no key."""
        return read_data_key(self.data_key_file)
