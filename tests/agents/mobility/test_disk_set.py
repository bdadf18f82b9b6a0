"""Disks that come and go while the stream goes on."""

import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.mobility.bookkeeping import finish, fold, make_pending
from agents.mobility.device import DeviceIdentity
from agents.mobility.disk_set import adopt_disks
from agents.mobility.stream_state import Pending, StreamStateFile
from replication.block_set import BlockSet
from replication.bookmark import Stamp

MACHINE = uuid.UUID(int=3)
BLOCKS = 16


def identity(index: int, block_count: int = BLOCKS) -> DeviceIdentity:
    return DeviceIdentity("boot", f"7:{index}", 1, block_count * 4096, f"image{index}")


def adopt(state: StreamStateFile, *indexes: int, block_count: int = BLOCKS) -> bool:
    return adopt_disks(
        state,
        dict.fromkeys(indexes, block_count),
        {index: identity(index, block_count) for index in indexes},
    )


def blocks(*numbers: int, block_count: int = BLOCKS) -> BlockSet:
    made = BlockSet(block_count)
    for number in numbers:
        made.add_run(number, 1)
    return made


@pytest.fixture
def state(tmp_path: Path) -> StreamStateFile:
    """A stream under way with disk 0, block 3 of which is to do."""
    made = StreamStateFile(str(tmp_path), MACHINE)
    made.save(
        {0: blocks(3)}, generation=1, committed=4, since=4, seeded=True, identities={0: identity(0)}
    )
    return made


def commit(state: StreamStateFile, sent: dict[int, BlockSet]) -> None:
    stamp = Stamp(1, state.position.committed + 1)
    make_pending(state, Pending(stamp, bytes(16), whole=True), sent, audit_chunk=0)
    finish(state)


def test_first_generation_is_nobodys_to_adopt(tmp_path: Path) -> None:
    assert not adopt(StreamStateFile(str(tmp_path), MACHINE), 0)


def test_same_disks_change_nothing(state: StreamStateFile) -> None:
    before = state.position
    assert not adopt(state, 0)
    assert state.position is before


def test_new_disk_is_to_do_as_a_whole_and_the_others_as_they_were(
    state: StreamStateFile, tmp_path: Path
) -> None:
    assert adopt(state, 0, 1)
    again = StreamStateFile(str(tmp_path), MACHINE)
    assert {disk: list(todo.runs()) for disk, todo in again.todo.items()} == {
        0: [(3, 1)],
        1: [(0, BLOCKS)],
    }
    position = again.position
    assert set(position.identities) == {0, 1}
    assert (position.generation, position.committed, position.seeded) == (1, 4, True)


def test_disk_that_goes_is_not_mentioned_any_more(state: StreamStateFile) -> None:
    adopt(state, 0, 1)
    assert adopt(state, 1)
    assert set(state.todo) == set(state.position.identities) == {1}


def test_changesets_lost_upstream_bring_back_no_disk_that_has_gone(state: StreamStateFile) -> None:
    commit(state, {0: blocks(3)})
    adopt(state, 0, 1)
    commit(state, {0: blocks(), 1: BlockSet.full(BLOCKS)})
    adopt(state, 1)
    fold(state, 4, (6, 5))
    assert set(state.todo) == {1}
    assert len(state.todo[1]) == BLOCKS


def test_disk_that_comes_back_larger_is_sent_whole_whatever_is_lost(state: StreamStateFile) -> None:
    commit(state, {0: blocks(3)})
    adopt(state, 1)
    adopt(state, 0, 1, block_count=2 * BLOCKS)
    fold(state, 4, (5,))
    assert len(state.todo[0]) == 2 * BLOCKS


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(
        st.one_of(
            st.sets(st.integers(0, 2), min_size=1).map(lambda disks: ("adopt", disks)),
            st.sets(st.integers(0, BLOCKS - 1)).map(lambda numbers: ("commit", numbers)),
            st.just(("lose", set[int]())),
        ),
        max_size=8,
    )
)
def test_what_is_not_at_the_second_site_is_always_to_do(
    steps: list[tuple[str, set[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    state = StreamStateFile(str(tmp_path_factory.mktemp("state")), MACHINE)
    state.save({0: BlockSet(BLOCKS)}, generation=1, seeded=True, identities={0: identity(0)})
    sites = [{0: set(range(BLOCKS))}]  # by changeset: what the second site holds as it is now
    for what, which in steps:
        if what == "adopt":
            adopt(state, *sorted(which))
            sites = [{disk: site.get(disk, set()) for disk in which} for site in sites]
        elif what == "commit":
            sent = {disk: blocks(*which) & todo for disk, todo in state.todo.items()}
            commit(state, sent)
            sites.append(
                {
                    disk: held | {block for block in which if block in sent[disk]}
                    for disk, held in sites[-1].items()
                }
            )
        elif len(sites) > 1:
            fold(state, len(sites) - 2, (len(sites) - 1,))
            state.save(committed=len(sites) - 2)
            sites.pop()
        assert set(state.todo) == set(sites[-1])
        for disk, held in sites[-1].items():
            missing = set(range(BLOCKS)) - held
            assert all(block in state.todo[disk] for block in missing)
