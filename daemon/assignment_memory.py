"""A node's newest assignment on its disk, and beside it what it followed before.

What was followed is written before an assignment of an older memory takes its place, and after a
newer one is there: killed between the two, a node neither forgets that it heard an older memory nor
takes its own for one.

Source: docs/CONTROL.md §4.
"""

import os
from typing import Generic, TypeVar

import structlog
from pydantic import ValidationError

from daemon.durable import write_whole
from daemon.identity import ASSIGNMENT_FILE, read_private
from daemon.service import Health
from replication.control.assignment import MachineAssignment, NodeAssignment
from replication.control.memory import Followed, judge, without_losses
from replication.control.message import Message

FOLLOWED_FILE = "followed.json"
HEALTH_PART = "older memory"

A = TypeVar("A", bound=NodeAssignment)
M = TypeVar("M", bound=Message)


class AssignmentMemory(Generic[A]):
    """What a node may follow.

    assignment: the newest that may be followed; None for a node that never heard one.
    is_older:   it is of an older memory: what it does not name may have been forgotten.
    """

    def __init__(self, folder: str, kind: type[A], health: Health) -> None:
        """Read what is on disk. Raises ConfigError for what others can read."""
        self._path = os.path.join(folder, ASSIGNMENT_FILE)
        self._followed_path = os.path.join(folder, FOLLOWED_FILE)
        self._health = health
        self.assignment: A | None = _read(self._path, kind)
        self._followed = _read(self._followed_path, Followed) or Followed()
        if self.assignment is not None:
            self._followed = judge(self._followed, self.assignment.version).followed
        self.is_older = self._followed.is_older
        self._tell()

    def take(self, newer: A) -> A:
        """Write down what of ``newer`` may be followed, and return it. Raises StorageError."""
        judged = judge(self._followed, newer.version)
        if not judged.wholly:
            newer = without_losses(newer, self.assignment)
            self._note(judged.followed)
        write_whole(self._path, newer.model_dump_json().encode())
        if judged.wholly:
            self._note(judged.followed)
        return newer

    def _note(self, followed: Followed) -> None:
        if followed != self._followed:
            write_whole(self._followed_path, followed.model_dump_json().encode())
            self._followed = followed

    def accept(self, assignment: A) -> None:
        """It is followed from now on; it has been taken."""
        self.assignment = assignment
        self.is_older = self._followed.is_older
        self._tell()

    def _tell(self) -> None:
        told = ""
        if self.is_older and self.assignment is not None:
            told = (
                f"the config server speaks from an older memory: assignment"
                f" {self.assignment.version} came after {self._followed.highest}; nothing is"
                " forgotten or deleted because of it. If what it knows now is right, confirm with"
                " `understudy-config-server --config FILE restored`"
            )
        if isinstance(self.assignment, MachineAssignment):
            self._health.report(HEALTH_PART, critical=told)
        else:
            # Critical would keep it from being given the machines that are to be protected again.
            self._health.report(HEALTH_PART, warning=told)


def _read(path: str, kind: type[M]) -> M | None:
    try:
        return kind.model_validate_json(read_private(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        # The next answer replaces it; until then there is nothing to follow.
        reason = f"{path} is damaged: {error.errors()[0]['msg']}"
        structlog.get_logger().warning("assignment passed over", reason=reason)
        return None
