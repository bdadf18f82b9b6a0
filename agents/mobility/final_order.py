"""Orders for a final changeset: what is wanted, and what came of it.

An order is known by its number. That it was begun is on disk before anything is frozen, so that an
agent which is killed meanwhile does not freeze the machine once more for it: what it froze is
thawed by then, so the order is not held, and only another number is carried out.

Source: docs/RECOVERY.md §4, docs/CONTROL.md §4.
"""

import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from daemon.durable import storage_error, sync_folder, write_whole
from replication.bookmark import Stamp

FINAL_FILE = "final.json"
REASON_CHARS_MAX = 500
ENDED = "the agent ended while it carried the order out: nothing is held frozen any more"


@dataclass(frozen=True, slots=True)
class FinalOrder:
    """Send a last changeset, and let no write be acknowledged after it for so long at most."""

    number: int
    seconds_max: float


@dataclass(frozen=True, slots=True)
class FinalTold:
    """What the config server is told: see `MachineReport.final`."""

    number: int = 0
    generation: int = 0
    changeset: int = 0
    reason: str = ""


NOTHING_TOLD = FinalTold()


class Proof(Protocol):
    """What shows that nothing was written since the final changeset."""

    def why_broken(self) -> str:
        """Why it holds no more; empty while it does. May be asked from any thread."""
        ...


class FinalBook:
    """The order that is wanted, and what came of the newest one; the latter is kept in ``folder``.

    on_change: called when there is something else to tell.
    announce:  tells it at once, or gives up soon.
    """

    def __init__(
        self,
        folder: str,
        on_change: Callable[[], None],
        announce: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._path = os.path.join(folder, FINAL_FILE)
        self._on_change = on_change
        self._announce = announce
        self._wanted: FinalOrder | None = None
        self._settled, self._reason = _read(self._path)
        self._held: tuple[Stamp, Proof] | None = None

    @property
    def wanted(self) -> FinalOrder | None:
        """The order that counts now; None when there is none, or it was taken back."""
        return self._wanted

    @property
    def is_due(self) -> bool:
        """Whether the order that counts is still to be carried out."""
        return self._wanted is not None and self._wanted.number != self._settled

    def want(self, number: int, seconds_max: float) -> None:
        """The newest word: an order, or none (0)."""
        self._wanted = FinalOrder(number, seconds_max) if number else None
        if not number:
            self.clear()

    def clear(self) -> None:
        """Nothing of an earlier order counts any more."""
        self._held = None
        if self._settled or self._reason:
            self._settled, self._reason = 0, ""
            try:
                os.unlink(self._path)
                sync_folder(os.path.dirname(self._path))
            except FileNotFoundError:
                return
            except OSError as error:
                raise storage_error("delete", self._path, error) from error

    def begin(self, number: int) -> None:
        """From here on, durably, the order is carried out; an end of the agent ends it."""
        self._write(number, ENDED)
        self._settled, self._reason = number, ""

    def hold(self, stamp: Stamp, proof: Proof) -> None:
        """The order that was begun is carried out and holds for as long as ``proof`` says so."""
        self._held = (stamp, proof)
        self._on_change()

    def repeat(self) -> None:
        """What is told is to be told once more: who waits for it counts on hearing it often."""
        self._on_change()

    async def announce(self) -> None:
        """Tell what is the case now, before what follows from it is done."""
        if self._announce is not None:
            await self._announce()

    def fail(self, number: int, reason: str) -> None:
        """The order could not be carried out, or does not hold any more."""
        self._held = None
        self._settled, self._reason = number, reason[:REASON_CHARS_MAX]
        self._on_change()
        self._write(number, self._reason)

    def revoke(self, reason: str) -> None:
        """What was held before is not any more, if anything was."""
        if self._held is not None:
            self.fail(self._settled, reason)

    def told(self) -> FinalTold:
        """What is the case just now; looks at the proof once more."""
        held, wanted = self._held, self._wanted
        if wanted is None or wanted.number != self._settled:
            return NOTHING_TOLD
        if held is None:
            return FinalTold(reason=self._reason)
        stamp, proof = held
        broken = proof.why_broken()
        if broken:
            return FinalTold(reason=broken)
        return FinalTold(wanted.number, stamp.generation, stamp.number)

    def _write(self, number: int, reason: str) -> None:
        write_whole(self._path, json.dumps({"order": number, "reason": reason}).encode())


def _read(path: str) -> tuple[int, str]:
    """Number and reason of the newest order that was begun; 0 for none.

    A file that cannot be understood is none: the worst is that the order is carried out once more.
    """
    try:
        with open(path, "rb") as file:
            tree: Any = json.load(file)
        return int(tree["order"]), str(tree["reason"])
    except FileNotFoundError:
        return 0, ""
    except (ValueError, KeyError, TypeError):
        return 0, ""
    except OSError as error:
        raise storage_error("read", path, error) from error
