"""What the process server is told: where it listens, its spool, its cache account, its limits."""

import os
import socket
import stat
import uuid
from typing import Self

from pydantic import Field, SecretStr, model_validator

from daemon.config import DaemonConfig, Section
from daemon.control_config import ControlConfig
from daemon.service import ServiceConfig
from daemon.tls import TlsFiles
from replication.errors import ConfigError
from replication.manifest import SEGMENT_BYTES_MAX

PORT_DEFAULT = 9443
SPOOL_BYTES_MIN = 2 * SEGMENT_BYTES_MAX


class ListenConfig(Section):
    """Where agents reach it. Port 0: any free one, told in the log.

    names:      DNS names and addresses that its certificate is to say, when it enrols; none: the
                host's name.
    public_url: what agents are told, where it is not the first name and the port.
    """

    host: str = "0.0.0.0"  # noqa: S104 - agents come from other machines, with certificates
    port: int = Field(default=PORT_DEFAULT, ge=0, le=65535)
    names: tuple[str, ...] = Field(default=(), max_length=32)
    public_url: str = Field(default="", pattern=r"^(https://[^/\s]+)?$")

    def certificate_names(self) -> tuple[str, ...]:
        return self.names or (socket.getfqdn(),)

    def url(self, port: int) -> str:
        """Where agents reach what listens on ``port``."""
        name = self.certificate_names()[0]
        host = f"[{name}]" if ":" in name else name
        return self.public_url or f"https://{host}:{port}"


class SpoolConfig(Section):
    """Where changesets wait until they are applied.

    bytes_max: of all segments in it; a commit, which lets it drain, is taken beyond.
    """

    folder: str
    bytes_max: int = Field(default=64 << 30, ge=SPOOL_BYTES_MIN)


class CacheConfig(Section):
    """The cache storage account, and how hard it is worked.

    uploads_max:       blobs on their way at once, over all machines.
    upload_bytes_max:  their bytes, which are in memory meanwhile.
    watermark_seconds: between two looks at a machine's watermark while something of it is not
                       applied; ``watermark_idle_seconds`` while all is.
    recheck_seconds:   after which an upload that is not applied is looked for; doubled each time.
    """

    connection_string: SecretStr | None = None
    connection_string_file: str | None = None
    api_version: str = "2026-06-06"
    uploads_max: int = Field(default=4, ge=1, le=64)
    upload_bytes_max: int = Field(default=32 << 20, ge=SEGMENT_BYTES_MAX)
    watermark_seconds: float = Field(default=1.0, gt=0)
    watermark_idle_seconds: float = Field(default=5.0, gt=0)
    recheck_seconds: float = Field(default=5.0, gt=0)

    @model_validator(mode="after")
    def _one_connection_string(self) -> Self:
        if (self.connection_string is None) == (self.connection_string_file is None):
            raise ValueError("give either connection_string or connection_string_file")
        return self

    def read_connection_string(self) -> str:
        """Raise ConfigError when the file that is to hold it cannot be read."""
        if self.connection_string is not None:
            return self.connection_string.get_secret_value()
        assert self.connection_string_file is not None
        try:
            with open(self.connection_string_file, encoding="utf-8") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                content = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the connection string in {self.connection_string_file}: {error}"
            ) from error
        if mode & 0o077:
            raise ConfigError(
                f"the connection string in {self.connection_string_file} can be read by others",
                hint=f"chmod 600 {self.connection_string_file}",
            )
        return content


class LimitConfig(Section):
    """What a client may cost.

    body_rate_bytes_per_second_min: a body that is slower on the whole, ``body_grace_seconds``
                                    aside, is refused.
    segments_in_flight_max:         segments and manifests received at once; more wait their turn.
    header_seconds_max:             from the connection to its first whole request, and again for
                                    the TLS handshake.
    idle_seconds_max:               how long a connection without a request stays open.

    Of each machine, so that none takes what others need:

    machine_spool_share_max:        of the spool, while other machines send too.
    machine_turns_max:              of ``segments_in_flight_max``, received at once.
    machine_waiting_max:            requests that wait for a turn.
    machine_attempts_max:           changesets begun and not committed.
    machine_attempt_bytes_max:      their segments together.
    """

    body_rate_bytes_per_second_min: int = Field(default=64 << 10, ge=1)
    body_grace_seconds: float = Field(default=10.0, gt=0)
    segments_in_flight_max: int = Field(default=16, ge=1, le=256)
    header_seconds_max: float = Field(default=10.0, gt=0)
    idle_seconds_max: float = Field(default=120.0, gt=0)
    retry_after_seconds: int = Field(default=1, ge=1)
    machine_spool_share_max: float = Field(default=0.5, gt=0, le=1)
    machine_turns_max: int = Field(default=4, ge=1, le=256)
    machine_waiting_max: int = Field(default=32, ge=0, le=4096)
    machine_attempts_max: int = Field(default=8, ge=1, le=1024)
    machine_attempt_bytes_max: int = Field(default=4 << 30, ge=SEGMENT_BYTES_MAX)


class Config(DaemonConfig):
    """The process server's configuration file.

    It knows its machines either from here, by ``tls`` and ``machines``, or from a config server.

    machines: who may send; empty: everyone who has a machine's certificate of the CA.
    """

    listen: ListenConfig = ListenConfig()
    tls: TlsFiles | None = None
    control: ControlConfig | None = None
    spool: SpoolConfig
    cache: CacheConfig
    limits: LimitConfig = LimitConfig()
    machines: tuple[uuid.UUID, ...] = ()
    service: ServiceConfig = ServiceConfig()

    @model_validator(mode="after")
    def _one_authority(self) -> Self:
        if (self.tls is None) == (self.control is None):
            raise ValueError("give either [tls], with certificates made by hand, or [control]")
        if self.control is not None and self.machines:
            raise ValueError("machines: with [control] the config server says who may send")
        return self
