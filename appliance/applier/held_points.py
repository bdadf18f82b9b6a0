"""What an applier says of the holds in its assignment.

Source: docs/RECOVERY.md §2; docs/CONTROL.md §5.
"""

from collections.abc import Sequence

from appliance.applier.holding import Answer, answer_of
from appliance.applier.store.holds import read_durable_holds
from appliance.applier.store.point_names import point_name
from appliance.applier.store.reader_store import ReaderStore
from daemon.troubles import clipped
from replication.control.recovery import DISKS_MAX, HeldPoint, Hold, PointDisk
from replication.errors import ReplicationError

HELD_BYTES_MAX = 448 << 10
"""Of all holds in one report as JSON; where there are more, each is in every few reports."""


def tell(hold: Hold, answer: Answer) -> HeldPoint:
    """One hold. Its folder is named by the machine's id, which no new name of it changes."""
    point = answer.point
    if point is None:
        return HeldPoint(
            id=hold.id, machine=hold.machine, state=answer.state, reason=clipped(answer.reason)
        )
    bookmark = point.bookmark
    return HeldPoint(
        id=hold.id,
        machine=hold.machine,
        state=answer.state,
        reason=clipped(answer.reason),
        folder=str(hold.machine),
        point=point_name(point),
        position=point.position,
        generation=bookmark.stamp.generation,
        number=bookmark.stamp.number,
        time_ns=max(0, bookmark.time_ns),
        consistency=bookmark.consistency.value,
        disks=tuple(
            PointDisk(index=disk.index, name=clipped(disk.name), size_bytes=disk.size_bytes)
            for disk in point.disks[:DISKS_MAX]
        ),
    )


def answer_on_disk(root: str, hold: Hold, otherwise: Answer) -> Answer:
    """What the machine's store says of a hold, while nobody has it open. Blocks."""
    reader = ReaderStore(root, hold.machine)
    try:
        holds = read_durable_holds(reader.folder)
        held = next((one for one in holds if one.id == hold.id), None)
        return otherwise if held is None else answer_of(held, reader.chain())
    except ReplicationError as error:
        return Answer.waits(str(error))


def fitting(told: Sequence[HeldPoint], nth: int) -> tuple[HeldPoint, ...]:
    """As many as a report has room for; another part of them in the ``nth`` report."""
    sizes = [len(one.model_dump_json().encode()) for one in told]
    if sum(sizes) <= HELD_BYTES_MAX:
        return tuple(told)
    begin = nth * max(1, len(told) // 8) % len(told)
    left, chosen = HELD_BYTES_MAX, []
    for at in (*range(begin, len(told)), *range(begin)):
        left -= sizes[at]
        if left < 0:
            break
        chosen.append(told[at])
    return tuple(chosen)
