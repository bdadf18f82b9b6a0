"""The ``[control]`` section that every node's configuration may have."""

from typing import Annotated

from pydantic import Field, field_validator

from daemon.config import Section
from replication.control.report import REPORT_SECONDS_DEFAULT

WAIT_SECONDS_MAX = 60.0
"""Of a long poll; the config server holds none for longer."""


class ControlConfig(Section):
    """Where the config server is and where this node keeps who it is.

    config_server:   https URL, by a name that stands in the config server's certificate.
    identity_folder: key, certificate, CA, assignment and data keys; the daemon's own, mode 0700.
    report_seconds:  between two reports.
    wait_seconds:    so long a question for a new assignment stays open.
    """

    config_server: str
    identity_folder: str
    report_seconds: Annotated[float, Field(gt=0, le=300)] = REPORT_SECONDS_DEFAULT
    wait_seconds: Annotated[float, Field(gt=0, le=WAIT_SECONDS_MAX)] = 50.0

    @field_validator("config_server")
    @classmethod
    def _is_https(cls, url: str) -> str:
        if not url.startswith("https://") or len(url) <= len("https://"):
            raise ValueError("an https:// URL was expected")
        return url.rstrip("/")
