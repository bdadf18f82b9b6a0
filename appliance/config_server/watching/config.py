"""What the configuration says of watching and of alert e-mail."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from appliance.config_server.watching.hysteresis import Settling
from daemon.config import Section

_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9.-]{1,253}")
RECIPIENTS_MAX = 50


class WatchingConfig(Section):
    """How often everything is looked at, what makes an event, how long events are kept.

    settle_seconds, clear_seconds: how long a reason must hold, or be gone, before it counts.
    event_days, event_count_max:   events that are over are deleted beyond either.
    """

    evaluate_seconds: float = Field(default=5.0, ge=0.1, le=60)
    settle_seconds: float = Field(default=20.0, ge=0, le=3600)
    clear_seconds: float = Field(default=60.0, ge=0, le=86400)
    event_days: int = Field(default=90, ge=1, le=3650)
    event_count_max: int = Field(default=100_000, ge=1000, le=10_000_000)

    @property
    def settling(self) -> Settling:
        return Settling(self.settle_seconds, self.clear_seconds)


class SmtpConfig(Section):
    """Where alerts are sent; without a host, nowhere.

    tls:           ``starttls`` on a plain port, ``tls`` from the first byte, ``none``: no password.
    ca:            PEM file of the CA of the server's certificate; the system's if not given.
    password_file: holds the user's password; its owner's alone.
    sender:        the address in From.
    gap_seconds:   between two e-mails; what comes meanwhile goes together in the next one.
    """

    host: str = ""
    port: int = Field(default=587, ge=1, le=65535)
    tls: Literal["starttls", "tls", "none"] = "starttls"
    ca: str | None = None
    user: str = ""
    password_file: str | None = None
    sender: str = ""
    to: tuple[str, ...] = Field(default=(), max_length=RECIPIENTS_MAX)
    min_severity: Literal["warning", "critical"] = "critical"
    gap_seconds: float = Field(default=60.0, ge=0, le=86400)
    timeout_seconds: float = Field(default=30.0, gt=0, le=600)

    @field_validator("host")
    @classmethod
    def _is_host(cls, host: str) -> str:
        if host and not re.fullmatch(r"[A-Za-z0-9.:_-]{1,253}", host):
            raise ValueError("a DNS name or an address was expected")
        return host

    @field_validator("sender")
    @classmethod
    def _is_address(cls, address: str) -> str:
        if address and not _ADDRESS.fullmatch(address):
            raise ValueError(f"{address!r:.80} is no e-mail address")
        return address

    @field_validator("to")
    @classmethod
    def _are_addresses(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            if not _ADDRESS.fullmatch(address):
                raise ValueError(f"{address!r:.80} is no e-mail address")
        return addresses

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if not self.host:
            return self
        if not self.sender or not self.to:
            raise ValueError("with smtp.host, smtp.sender and smtp.to are needed")
        if bool(self.user) != bool(self.password_file):
            raise ValueError("smtp.user and smtp.password_file go together")
        if self.user and self.tls == "none":
            raise ValueError("a password is not sent without TLS: set smtp.tls")
        return self
