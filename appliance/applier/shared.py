"""What all machines of one applier have together."""

import asyncio
import uuid
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from appliance.applier.cache_account import CacheAccount
from appliance.applier.config import ApplierConfig
from appliance.applier.fetch import ByteWindow
from appliance.applier.metrics import ApplierMetrics
from daemon.service import Health


@dataclass(frozen=True, slots=True)
class Shared:
    """One for all machines of a daemon.

    owner: the lease id of this applier.
    slots: changesets that may be applied at once.
    pool:  the threads that open frames.
    report_now: lets the config server, if there is one, hear at once of what has changed.
    """

    config: ApplierConfig
    account: CacheAccount
    owner: uuid.UUID
    window: ByteWindow
    slots: asyncio.Semaphore
    pool: Executor
    health: Health
    metrics: ApplierMetrics
    report_now: Callable[[], None]
