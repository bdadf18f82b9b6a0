"""What the config server is told about its own identity and the nodes'."""

from pydantic import Field

from daemon.config import Section

CERTIFICATE_DAYS_DEFAULT = 90.0


class IdentityConfig(Section):
    """The ``[identity]`` section.

    unlock_file:      a passphrase or a key, at least 16 bytes, mode 0600: it unseals the keys.
                      Keep a copy apart from the backups of the state folder.
    certificate_days: how long a certificate is good; it is renewed at two thirds of that.
    """

    unlock_file: str = "/etc/understudy/config-server.unlock"
    certificate_days: float = Field(default=CERTIFICATE_DAYS_DEFAULT, gt=0, le=825)
