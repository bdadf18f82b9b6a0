"""What a node may be called, and reached under: pure.

Two that answer to one name could pass for each other. Loopback names are nobody's: they lead no
further than the caller's own host.
"""

import ipaddress
import uuid
from collections.abc import Iterable

_LOOPBACK = "localhost"


def is_id(name: str) -> bool:
    """Whether a name would be taken for a node's id where either may be given."""
    try:
        uuid.UUID(name)
    except ValueError:
        return False
    return True


def shared_name(names: Iterable[str], others: Iterable[str]) -> str | None:
    """The first of ``names`` that is one of ``others`` as well, however it is written."""
    taken = {_plain(name) for name in others}
    return next((name for name in names if _plain(name) in taken and not _is_loopback(name)), None)


def _plain(name: str) -> str:
    """One spelling of a DNS name or an address."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower().rstrip(".")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return _plain(name) == _LOOPBACK
