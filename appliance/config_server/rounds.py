"""Work that comes round every few seconds, as long as the daemon lives.

What goes wrong in a round is told by the health while it lasts, a defect also by the log, once; the
next round tries again. So what one part of the config server cannot do keeps no agent from its
assignment and nobody from a failover. A damaged database alone ends the daemon: whatever is read
from it may be wrong.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import structlog
from pydantic import ValidationError

from daemon.service import Health
from replication.errors import IntegrityError, ReplicationError

TROUBLES_TOLD_MAX = 3


@dataclass(frozen=True, slots=True)
class Trouble:
    """What cannot be gone on with in a round, and why.

    defect: what our own code raised, for the log.
    """

    what: str
    why: str
    defect: Exception | None = None

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


@contextlib.contextmanager
def apart(
    what: str, troubles: list[Trouble], *, let: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Within, what only this one suffers from becomes a trouble, and holds up nothing else.

    What all would suffer from is raised: a database that is away or damaged. let: is raised too.
    """
    try:
        yield
    except let:
        raise
    except ReplicationError as error:
        if error.retryable or isinstance(error, IntegrityError):
            raise
        troubles.append(Trouble(what, str(error)))
    except (ValidationError, KeyError) as error:
        troubles.append(Trouble(what, "its row cannot be read", error))
    except Exception as error:  # noqa: BLE001 - told by the log and the health
        troubles.append(Trouble(what, f"a defect: {error!r}", error))


async def go_round(
    part: str,
    look: Callable[[], Awaitable[Sequence[Trouble]]],
    health: Health,
    seconds: float,
    *,
    failing: str,
    is_grave: bool = True,
    wake: asyncio.Event | None = None,
) -> None:
    """Look every so many seconds until cancelled. Raises IntegrityError for a damaged database.

    part:     of the health.
    failing:  what is not done while a round fails as a whole.
    is_grave: troubles are critical, not warnings.
    wake:     set for a look at once.
    """
    wake = wake or asyncio.Event()
    before: frozenset[str] = frozenset()
    while True:
        wake.clear()
        try:
            troubles = await look()
        except IntegrityError:
            raise
        except ReplicationError as error:
            troubles = (Trouble(failing, str(error)),)
        except Exception as error:  # noqa: BLE001 - told by the log and the health
            troubles = (Trouble(failing, f"a defect: {error!r}", error),)
        told = [str(trouble) for trouble in troubles]
        reason = "; ".join(told[:TROUBLES_TOLD_MAX])
        health.report(part, **{"critical" if is_grave else "warning": reason})
        for trouble in troubles:
            if trouble.defect is not None and str(trouble) not in before:
                structlog.get_logger().error(
                    "a round has a defect", part=part, what=trouble.what, exc_info=trouble.defect
                )
        before = frozenset(told)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await wake.wait()
