"""What the config server is told: where it listens, where its state is, what it allows.

A part of the config server adds a Section of its own (in its package's ``config.py``) and a field
here.
"""

import os
import socket

from pydantic import Field, SecretStr, field_validator

from appliance.config_server.identity.config import IdentityConfig
from appliance.config_server.protection.config import JobsConfig
from appliance.config_server.recovery.config import RecoveryConfig
from appliance.config_server.watching.config import SmtpConfig, WatchingConfig
from daemon.config import DaemonConfig, Section
from daemon.service import ServiceConfig

PORT_DEFAULT = 443
DATABASE_FILE = "config-server.db"
DATABASE_SCHEMES = ("sqlite+aiosqlite://", "postgresql+psycopg://")


class ListenConfig(Section):
    """Where operators and nodes reach it. Port 0: any free one, told in the log.

    names: DNS names and addresses that stand in its certificate; none: the host's own name.
    """

    host: str = "0.0.0.0"  # noqa: S104 - nodes and operators come from other machines
    port: int = Field(default=PORT_DEFAULT, ge=0, le=65535)
    names: tuple[str, ...] = ()

    def certificate_names(self) -> tuple[str, ...]:
        """Names and addresses that the server's certificate is for; ``localhost`` always."""
        own = self.names or (socket.getfqdn(),)
        return tuple(dict.fromkeys((*own, "localhost", "127.0.0.1")))


class DatabaseConfig(Section):
    """Where the state is: SQLite in the state folder, or PostgreSQL.

    url:             ``postgresql+psycopg://user:password@host/name``; none: SQLite.
    connections_max: at once.
    """

    url: SecretStr | None = None
    connections_max: int = Field(default=8, ge=2, le=64)

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not url.get_secret_value().startswith(DATABASE_SCHEMES):
            raise ValueError(f"must begin with one of {', '.join(DATABASE_SCHEMES)}")
        return url


class LimitConfig(Section):
    """What a caller may cost.

    requests_per_second, requests_burst: of a source address without a certificate.
    node_requests_per_second, node_requests_burst: of one node, wherever it comes from.
    connections_max:             at once, over all.
    connections_per_source_max:  of a source, those of nodes aside.
    connections_per_node_max:    of one node, wherever they come from.
    data_keys_per_minute:        that one node may ask for; an applier may ask for one of each of
                                 its machines at once, since it keeps them.
    header_seconds_max:          for the TLS handshake, and again for a request's header.
    body_seconds_max:            for a request's body.
    idle_seconds_max:            that a connection without a request stays open.
    """

    requests_per_second: float = Field(default=30.0, gt=0)
    requests_burst: int = Field(default=120, ge=1)
    node_requests_per_second: float = Field(default=10.0, gt=0)
    node_requests_burst: int = Field(default=60, ge=1)
    connections_max: int = Field(default=4096, ge=1)
    connections_per_source_max: int = Field(default=256, ge=1)
    connections_per_node_max: int = Field(default=16, ge=2)
    data_keys_per_minute: float = Field(default=6.0, gt=0)
    header_seconds_max: float = Field(default=10.0, gt=0)
    body_seconds_max: float = Field(default=20.0, gt=0)
    idle_seconds_max: float = Field(default=75.0, gt=0)


class PoliciesConfig(Section):
    """What policies may say.

    allow_short_crash_frequency: crash-consistent points more often than every 5 minutes: for labs.
    """

    allow_short_crash_frequency: bool = False


class AuditConfig(Section):
    """How long the audit log is kept: entries beyond either are deleted, the oldest first."""

    days: int = Field(default=400, ge=1, le=3650)
    count_max: int = Field(default=1_000_000, ge=1000, le=100_000_000)


class ConfigServerConfig(DaemonConfig):
    """The config server's configuration file.

    state_folder: keys, and the database where it is SQLite.
    """

    state_folder: str = "/var/lib/understudy-config-server"
    listen: ListenConfig = ListenConfig()
    identity: IdentityConfig = IdentityConfig()
    database: DatabaseConfig = DatabaseConfig()
    policies: PoliciesConfig = PoliciesConfig()
    jobs: JobsConfig = JobsConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    limits: LimitConfig = LimitConfig()
    audit: AuditConfig = AuditConfig()
    watching: WatchingConfig = WatchingConfig()
    smtp: SmtpConfig = SmtpConfig()
    service: ServiceConfig = ServiceConfig()

    def database_url(self) -> str:
        """Its URL for SQLAlchemy; it may hold a password."""
        if self.database.url is not None:
            return self.database.url.get_secret_value()
        return f"sqlite+aiosqlite:///{os.path.abspath(self.state_folder)}/{DATABASE_FILE}"
