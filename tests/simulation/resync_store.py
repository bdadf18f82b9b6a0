"""What a simulated second site holds, and what it is sent."""

import os
import shutil
from dataclasses import dataclass, field

from appliance.applier.resync_record import ResyncRecord
from replication.bookmark import NOTHING, Stamp
from replication.manifest import Manifest
from replication.watermark import NO_ATTEMPT
from tests.simulation.test_stream_survives import BLOCK_COUNT


@dataclass(frozen=True)
class Changeset:
    manifest: Manifest
    content: dict[int, int]
    snapshot: tuple[int, ...]


@dataclass
class Store:
    """A store of the machine, with its durable record of resyncs."""

    folder: str
    target: list[int] = field(default_factory=lambda: [0] * BLOCK_COUNT)
    head: Stamp = NOTHING
    attempt: bytes = NO_ATTEMPT

    def __post_init__(self) -> None:
        os.makedirs(self.folder, exist_ok=True)
        self.record = ResyncRecord(self.folder)

    def copy_to(self, folder: str) -> "Store":
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        return Store(folder, list(self.target), self.head, self.attempt)
