"""The set of protected disks changes while the stream goes on.

A disk that comes is to do as a whole from then on, one that goes is not mentioned any more: both
within the generation, as FORMAT.md §6 allows, so that nothing of the other disks is sent again.
Points appear again as soon as all of a new disk has been sent.

The tracker of a new disk runs before this is remembered, and the tracker of one that has gone ends
after it is: so at every instant a block that changed is known somewhere, or nobody asks for it.
"""

from collections.abc import Mapping

import structlog

from agents.mobility.device import DeviceIdentity
from agents.mobility.stream_state import StreamStateFile
from replication.block_set import BlockSet


def adopt_disks(
    state: StreamStateFile,
    block_counts: Mapping[int, int],
    identities: Mapping[int, DeviceIdentity],
) -> bool:
    """Take in the disks that are there now, durably; False where nothing has changed.

    No commit may be pending: its blocks would be taken for those of a disk that came back.
    """
    position = state.position
    known = position.identities
    if not known or set(known) == set(identities):
        return False
    assert position.pending is None, "a pending commit is settled first"
    todo = {
        index: state.todo[index] if index in known else BlockSet.full(count)
        for index, count in block_counts.items()
    }
    structlog.get_logger().info(
        "the set of protected disks changes",
        added=sorted(set(identities) - set(known)),
        removed=sorted(set(known) - set(identities)),
    )
    state.save(todo, identities={index: known.get(index, now) for index, now in identities.items()})
    return True
