"""``base.json``: where a machine's base is, without the catalogue.

It is what makes the catalogue rebuildable once folding has used up the oldest layers, and it says
whether a fold had begun to write when the power went.

Source: docs/STORE.md §4.2.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import xxhash

from appliance.applier.store.layer_format import shapes_from_json, shapes_to_json
from appliance.applier.store.model import Point
from daemon.durable import storage_error, write_whole
from replication.bookmark import Bookmark, Consistency, Stamp
from replication.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "base.json"


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """State of the base.

    point:      the base's own position; None before anything was folded (position 0).
    folding_to: a fold to this position has begun to write into the base; None when none has.
    sizes:      bytes of each disk's image and digests after the newest fold that has ended. They
                never shrink: a file that is shorter has lost what would look like zeros.
    """

    machine: uuid.UUID
    name: str
    point: Point | None
    folding_to: int | None
    sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def position(self) -> int:
        return self.point.position if self.point else 0

    @property
    def reach(self) -> int:
        """The newest position whose blocks the base may hold: no older one can be viewed."""
        return self.position if self.folding_to is None else self.folding_to

    def write(self, folder: str) -> None:
        """Durably: after a crash the old record is there or this one."""
        tree = {
            "machine": str(self.machine),
            "name": self.name,
            "folding_to": self.folding_to,
            "point": _point_to_json(self.point) if self.point else None,
            "sizes": {str(disk): list(sizes) for disk, sizes in sorted(self.sizes.items())},
        }
        body = json.dumps(tree, sort_keys=True).encode() + b"\n"
        digest = xxhash.xxh3_128_hexdigest(body).encode() + b"\n"
        write_whole(os.path.join(folder, NAME), digest + body)

    @classmethod
    def read(cls, folder: str) -> BaseRecord | None:
        """None when there is none yet; IntegrityError when it is not what was written."""
        path = os.path.join(folder, NAME)
        try:
            with open(path, "rb") as file:
                digest, _, body = file.read().partition(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error("read", path, error) from error
        if xxhash.xxh3_128_hexdigest(body).encode() != digest:
            raise IntegrityError(f"{path} does not have the digest that its first line declares")
        try:
            tree = json.loads(body)
            return cls(
                machine=uuid.UUID(tree["machine"]),
                name=tree["name"],
                point=_point_from_json(tree["point"]) if tree["point"] else None,
                folding_to=tree["folding_to"],
                sizes={
                    int(disk): (int(image), int(digests))
                    for disk, (image, digests) in tree.get("sizes", {}).items()
                },
            )
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{path} is not as specified: {error}") from error


def _point_to_json(point: Point) -> dict[str, Any]:
    return {
        "position": point.position,
        "generation": point.bookmark.stamp.generation,
        "number": point.bookmark.stamp.number,
        "time_ns": point.bookmark.time_ns,
        "consistency": point.bookmark.consistency.value,
        "reason": point.bookmark.reason,
        "attempt": point.attempt.hex(),
        "applied_ns": point.applied_ns,
        "changed_bytes": point.changed_bytes,
        "disks": shapes_to_json(point.disks),
    }


def _point_from_json(tree: dict[str, Any]) -> Point:
    return Point(
        position=tree["position"],
        bookmark=Bookmark(
            Stamp(tree["generation"], tree["number"]),
            tree["time_ns"],
            Consistency(tree["consistency"]),
            tree["reason"],
        ),
        attempt=bytes.fromhex(tree["attempt"]),
        applied_ns=tree["applied_ns"],
        changed_bytes=tree["changed_bytes"],
        verified_ns=None,
        disks=shapes_from_json(tree["disks"]),
    )
