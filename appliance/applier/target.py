"""A machine that is to be applied, as the configuration or the config server wants it just now."""

import uuid
from dataclasses import dataclass, field

from appliance.applier.holding import Wish
from appliance.applier.retention import RetentionPolicy


@dataclass(frozen=True, slots=True)
class Target:
    """One machine.

    data_key:   opens what its agent sends.
    key_source: where the key comes from, for whoever reads that it does not fit.
    apply:      False: what is in the cache stays there.
    keep:       False: its points stay as they are, none is ever thinned: its protection has ended,
                or it is failed over, and its last changeset may still have to be applied.
    wish:       points that are to be held; None where nobody says it: what is held stays so.
    """

    id: uuid.UUID
    name: str
    retention: RetentionPolicy
    data_key: bytes = field(repr=False)
    key_source: str
    apply: bool = True
    keep: bool = True
    wish: Wish | None = None
