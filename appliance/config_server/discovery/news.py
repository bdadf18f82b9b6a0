"""What a reader tells of its vCenter, in the order in which it happens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from appliance.config_server.discovery.inventory import Vm


@dataclass(frozen=True, slots=True)
class Connected:
    """It is logged in to the vCenter of this instance UUID."""

    instance_uuid: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All VMs that there are, by moid."""

    vms: Mapping[str, Vm]


@dataclass(frozen=True, slots=True)
class Delta:
    """VMs that are new or other than they were, and the moids of those that are gone."""

    changed: Mapping[str, Vm]
    removed: frozenset[str]


@dataclass(frozen=True, slots=True)
class Alive:
    """It answers, and nothing has changed."""


@dataclass(frozen=True, slots=True)
class Unreachable:
    """It cannot be asked now, and is asked again by itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """It does not let us in: nothing is tried until somebody changes the entry."""

    reason: str


News = Connected | Snapshot | Delta | Alive | Unreachable | Refused
Deliver = Callable[[News], None]
"""Returns when the news is kept; raises when nobody wants to hear any more."""


class UnwantedError(Exception):
    """Nobody wants to hear of this vCenter any more (or not from us): the thread ends."""


class MistakenError(Exception):
    """What answers is another vCenter than the one that was there."""
