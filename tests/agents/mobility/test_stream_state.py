"""What the agent remembers: there whole after any crash, refused when it is damaged."""

import os
import random
import signal
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from agents.mobility import bookkeeping
from agents.mobility.device import DeviceIdentity
from agents.mobility.stream_state import (
    BlockSets,
    Pending,
    StreamStateFile,
    merge,
    size_of,
    subtract,
)
from replication.block_set import BlockSet
from replication.bookmark import Stamp
from replication.errors import IntegrityError, StorageError

MACHINE = uuid.UUID(int=5)
BLOCKS = 1000
IDENTITY = DeviceIdentity("boot", "7:1", 4, BLOCKS * 4096, "8:1:77")


def blocks(*numbers: int, count: int = BLOCKS) -> BlockSet:
    made = BlockSet(count)
    for number in numbers:
        made.add_run(number, 1)
    return made


def opened(folder: Path) -> StreamStateFile:
    return StreamStateFile(str(folder), MACHINE)


def begun(folder: Path) -> StreamStateFile:
    """Generation 2, two disks, some work to do."""
    state = opened(folder)
    todo = {0: blocks(1, 2, 3), 4: blocks(7, count=64)}
    state.save(todo, generation=2, identities={0: IDENTITY})
    return state


def same(a: StreamStateFile, b: StreamStateFile) -> bool:
    return (a.position, a.todo, a.retained()) == (b.position, b.todo, b.retained())


def test_everything_is_there_again(tmp_path: Path) -> None:
    state = begun(tmp_path)
    pending = Pending(Stamp(2, 9), b"p" * 16, whole=False)
    state.save(
        committed=8, attempt=b"a" * 16, since=6, applied=Stamp(2, 5), repaired=1, repairing=2,
        seeded=True, audit_chunk=12, pending=pending,
    )  # fmt: skip
    state.retain(9, 6, {0: blocks(3), 4: blocks(7, count=64)})
    again = opened(tmp_path)
    assert same(state, again)
    assert again.position.pending == pending
    assert again.position.identities == {0: IDENTITY}
    assert again.retained() == {9: 6}
    assert again.read_retained(9) == {0: blocks(3), 4: blocks(7, count=64)}
    assert size_of(again.todo) == 4 * 4096


def killed_at(call: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a child that dies before its ``call``-th durable call; whether it did."""
    child = os.fork()
    if child == 0:
        calls = 0

        def mortal(real: Callable[..., object]) -> Callable[..., object]:
            def wrapped(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return wrapped

        for name in ("open", "fsync", "rename", "unlink"):
            setattr(os, name, mortal(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def after_each_crash(
    tmp_path: Path,
    prepare: Callable[[StreamStateFile], object],
    step: Callable[[StreamStateFile], object],
) -> list[StreamStateFile]:
    """The state as it is found again when ``step`` is killed at each of its durable calls."""
    found = []
    call = 1
    while True:
        folder = tmp_path / f"killed{call}"
        state = begun(folder)
        prepare(state)
        died = killed_at(call, lambda: step(state))  # noqa: B023 - it is over with the round
        found.append(opened(folder))
        left = [name for name in os.listdir(state.folder) if name.endswith(".new")]
        left += [name for name in os.listdir(f"{state.folder}/retained") if "new" in name]
        assert left == []
        if not died:
            return found
        call += 1


def test_killed_save_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    found = after_each_crash(
        tmp_path,
        lambda state: None,
        lambda state: state.save({0: blocks(5), 4: blocks(count=64)}, committed=3),
    )
    for state in found:
        old = state.position.committed == 0 and state.todo[0] == blocks(1, 2, 3)
        new = state.position.committed == 3 and state.todo[0] == blocks(5)
        assert old or new
    assert {state.position.committed for state in found} == {0, 3}


PENDING = Pending(Stamp(2, 1), b"p" * 16, whole=True)
SENT: BlockSets = {0: blocks(1, 2, 9), 4: blocks(7, count=64)}


def test_killed_make_pending_leaves_none_or_one_whose_blocks_are_known(tmp_path: Path) -> None:
    found = after_each_crash(
        tmp_path,
        lambda state: None,
        lambda state: bookkeeping.make_pending(state, PENDING, SENT, audit_chunk=3),
    )
    for state in found:
        assert state.todo[0] == blocks(1, 2, 3)
        if state.position.pending:
            assert state.read_retained(1) == SENT
    assert {state.position.pending for state in found} == {None, PENDING}


def test_killed_finish_takes_out_what_was_sent_once_or_not_yet(tmp_path: Path) -> None:
    def prepare(state: StreamStateFile) -> None:
        bookkeeping.make_pending(state, PENDING, SENT, audit_chunk=3)

    for state in after_each_crash(tmp_path, prepare, bookkeeping.finish):
        if state.position.pending:
            assert state.todo[0] == blocks(1, 2, 3)
            bookkeeping.finish(state)
        assert state.todo == {0: blocks(3), 4: blocks(count=64)}
        assert (state.position.committed, state.position.since) == (1, 1)
        assert state.read_retained(1) == SENT


def test_killed_fold_has_the_lost_blocks_to_do_or_still_kept(tmp_path: Path) -> None:
    def prepare(state: StreamStateFile) -> None:
        bookkeeping.make_pending(state, PENDING, SENT, audit_chunk=3)
        bookkeeping.finish(state)

    for state in after_each_crash(tmp_path, prepare, lambda state: bookkeeping.fold(state, 0, [1])):
        if state.position.since:
            assert state.read_retained(1) == SENT
            bookkeeping.fold(state, 0, [1])
        assert state.todo == {0: blocks(1, 2, 3, 9), 4: blocks(7, count=64)}


def test_finish_that_cannot_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = begun(tmp_path)
    bookkeeping.make_pending(state, PENDING, SENT, audit_chunk=3)
    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", refuse)
        with pytest.raises(StorageError, match="No space"):
            bookkeeping.finish(state)
    assert state.position.pending == PENDING
    assert state.todo[0] == blocks(1, 2, 3)
    state.save()
    again = opened(tmp_path)
    bookkeeping.drop_pending(again)
    assert again.todo[0] == blocks(1, 2, 3)


def refuse(*_: object) -> None:
    raise OSError(28, os.strerror(28))


def test_sets_of_a_disk_that_is_not_known_are_never_dropped() -> None:
    todo: BlockSets = {0: blocks(1)}
    with pytest.raises(AssertionError, match="disk 1"):
        merge(todo, {1: blocks(1)})
    subtract(todo, {0: blocks(1, 2), 3: blocks(1)})
    assert todo == {0: blocks()}


def flipped(path: str, offset: int) -> bytes:
    with open(path, "r+b") as file:
        whole = file.read()
        file.seek(offset)
        file.write(bytes([whole[offset] ^ 1 << offset % 8]))
    return whole


def test_damage_anywhere_is_refused_with_the_file_s_name(tmp_path: Path) -> None:
    state = begun(tmp_path)
    state.retain(1, 0, SENT)
    kept = f"retained/{os.listdir(f'{state.folder}/retained')[0]}"
    reads: list[tuple[str, Callable[[], object]]] = [
        ("stream.state", lambda: opened(tmp_path)),
        (kept, lambda: state.read_retained(1)),
    ]
    for name, read in reads:
        path = f"{state.folder}/{name}"
        size = os.path.getsize(path)
        for offset in [*range(40), *random.Random(3).sample(range(size), 60)]:
            whole = flipped(path, offset)
            with pytest.raises(IntegrityError, match=name) as caught:
                read()
            assert "are then compared" in str(caught.value)
            Path(path).write_bytes(whole)
        for length in (0, 10, 40, size - 1):
            Path(path).write_bytes(whole[:length])
            with pytest.raises(IntegrityError, match=name):
                read()
            Path(path).write_bytes(whole)
        read()


def test_set_that_is_gone_is_told(tmp_path: Path) -> None:
    state = begun(tmp_path)
    with pytest.raises(IntegrityError, match="changeset 5 is gone"):
        state.read_retained(5)


def test_number_names_one_set_whatever_attempts_left(tmp_path: Path) -> None:
    state = begun(tmp_path)
    state.retain(4, 3, {0: blocks(1)})
    state.retain(4, 1, {0: blocks(2)})
    assert opened(tmp_path).retained() == {4: 1}
    assert state.read_retained(4) == {0: blocks(2)}


def test_new_generation_keeps_nothing_of_old_ones(tmp_path: Path) -> None:
    state = begun(tmp_path)
    state.retain(4, 3, {0: blocks(1)})
    os.unlink(f"{state.folder}/stream.state")  # as the hint of a damaged one says
    state = opened(tmp_path)
    assert state.position.generation == 0
    state.save({0: blocks()}, generation=2)
    assert state.retained() == {}
    state.retain(1, 0, {0: blocks(1)})
    state.drop_retained()
    assert os.listdir(f"{state.folder}/retained") == []


def test_strays_are_gone_at_the_next_start(tmp_path: Path) -> None:
    state = begun(tmp_path)
    state.retain(4, 3, {0: blocks(1)})
    strays = ["stream.state.ab12.new", "retained/00000001-000000000002-000000000001.sets",
              "retained/00000002-000000000004-000000000003.sets.ff00.new"]  # fmt: skip
    for name in strays:
        Path(state.folder, name).write_bytes(b"x")
    Path(state.folder, "status.json").write_text("{}")
    again = opened(tmp_path)
    assert same(state, again)
    assert not any(Path(state.folder, name).exists() for name in strays)
    assert Path(state.folder, "status.json").exists()
