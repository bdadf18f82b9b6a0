"""What the agent remembers of a resync that is required or under way."""

from dataclasses import dataclass
from enum import StrEnum

from replication.control.report import ResyncCause
from replication.document import Document
from replication.errors import PeerError


class Stage(StrEnum):
    """How far a resync has come."""

    REQUIRED = "required"
    """Nothing is sent until it may begin: changes alone would claim what is not so."""

    COMPARING = "comparing"
    """Its generation has begun; the changeset that closes the one before is all that is sent."""

    SENDING = "sending"
    """What differs is in ``todo``; it ends when all of that has been sent."""


@dataclass(frozen=True, slots=True)
class Resync:
    """A resync that is required or under way.

    cause, reason: why, as a code and in words.
    ordered:       somebody wants it now, whatever the window.
    cursor:        while comparing: bytes over all disks, one after another, whose differences from
                   the state ``Position.basis`` are in ``todo``.
    """

    cause: ResyncCause
    reason: str
    ordered: bool = False
    stage: Stage = Stage.REQUIRED
    cursor: int = 0

    def to_tree(self) -> dict[str, object]:
        """As a part of the agent's state."""
        return {
            "cause": self.cause.value,
            "reason": self.reason,
            "ordered": self.ordered,
            "stage": self.stage.value,
            "cursor": self.cursor,
        }

    @classmethod
    def from_document(cls, tree: Document) -> "Resync":
        """Raise PeerError when it is none."""
        try:
            cause, stage = ResyncCause(tree.text("cause")), Stage(tree.text("stage"))
        except ValueError as error:
            raise PeerError(f"state.resync: {error}") from error
        return cls(cause, tree.text("reason"), tree.flag("ordered"), stage, tree.uint("cursor"))
