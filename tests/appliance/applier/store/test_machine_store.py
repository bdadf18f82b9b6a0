import subprocess
import sys
import time
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.applier.store import MachineStore, block_map, open_reader
from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp
from replication.errors import (
    ConfigError,
    OutOfOrderError,
    PeerError,
    ReplicationError,
    UnavailableError,
)
from tests.appliance.applier.store.recorded_machine import (
    BLOCK,
    MACHINE,
    RecordedMachine,
    assert_equals_images,
)

ATTEMPT = b"b" * 16
SHAPE = [DiskShape(0, "sda", 8 * BLOCK)]


def seal(
    store: MachineStore, generation: int, number: int, since: int, attempt: bytes = ATTEMPT
) -> int:
    with store.begin() as writer:
        writer.write(0, number % 8, 0, bytes([number % 255]) * BLOCK)
        bookmark = Bookmark(Stamp(generation, number), number, Consistency.CRASH)
        return writer.seal(bookmark, since, attempt, SHAPE)


@pytest.fixture
def store(tmp_path: Path) -> MachineStore:
    return MachineStore.open(str(tmp_path), MACHINE)


def test_head_follows_the_changesets(store: MachineStore) -> None:
    assert store.points() == []
    assert seal(store, 1, 1, 0) == 1
    assert seal(store, 1, 4, 1) == 2
    assert seal(store, 2, 1, 0) == 3
    head = store.head
    assert head is not None
    assert (head.position, head.stamp, head.attempt) == (3, Stamp(2, 1), ATTEMPT)


@pytest.mark.parametrize(
    ("generation", "number", "since"),
    [(2, 5, 5), (2, 3, 2), (2, 7, 6), (1, 9, 4), (3, 1, 1), (3, 2, 1)],
)
def test_what_does_not_follow_is_refused_and_changes_nothing(
    store: MachineStore, generation: int, number: int, since: int
) -> None:
    seal(store, 2, 1, 0)
    seal(store, 2, 5, 1)
    with pytest.raises(OutOfOrderError, match="expected"):
        seal(store, generation, number, since, b"c" * 16)
    assert store.head is not None
    assert store.head.stamp == Stamp(2, 5)


def test_applying_the_same_attempt_again_says_so(store: MachineStore) -> None:
    seal(store, 1, 1, 0)
    with pytest.raises(OutOfOrderError, match="applied already"):
        seal(store, 1, 1, 0)


@pytest.mark.parametrize(("disk", "block"), [(0, 8), (1, 0)])
def test_blocks_outside_the_disks_are_refused(store: MachineStore, disk: int, block: int) -> None:
    with store.begin() as writer:
        writer.write(disk, block, 0, b"x" * BLOCK)
        bookmark = Bookmark(Stamp(1, 1), 1, Consistency.CRASH)
        with pytest.raises(PeerError):
            writer.seal(bookmark, 0, ATTEMPT, SHAPE)
    assert store.head is None


def test_an_abandoned_changeset_leaves_nothing(store: MachineStore) -> None:
    with store.begin() as writer:
        writer.write(0, 0, 0, b"x" * BLOCK)
    assert not list(Path(store.folder, "incoming").iterdir())
    assert store.head is None


def test_a_second_writer_is_refused(tmp_path: Path, store: MachineStore) -> None:
    with pytest.raises(UnavailableError, match="in use"):
        MachineStore.open(str(tmp_path), MACHINE)
    store.close()
    MachineStore.open(str(tmp_path), MACHINE).close()


def test_an_unknown_machine_or_position_is_named(tmp_path: Path, store: MachineStore) -> None:
    seal(store, 1, 1, 0)
    with pytest.raises(ConfigError, match="position 9"):
        store.open_view(9, 0)
    with pytest.raises(ConfigError, match="disk 3"):
        store.open_view(1, 3)
    with pytest.raises(ConfigError, match="holds nothing"):
        open_reader(str(tmp_path / "elsewhere"), MACHINE).points()


def test_a_disk_that_shrank_and_grew_again_shows_no_old_blocks(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path))
    with machine.open() as store:
        for blocks in (64, 20, 70, 3, 64):
            machine.resize(0, blocks, tail_bytes=512 if blocks == 20 else 0)
            machine.apply(store)
            assert_equals_images(store, machine) if blocks != 20 else None
        store.fold_to(4)
        store.merge(5, 5)


def test_merging_keeps_neighbours_of_two_layers_apart(store: MachineStore) -> None:
    for number in range(1, 8):
        seal(store, 1, number, number - 1)
    store.merge(1, 7)
    with store.open_view(7, 0) as view:
        assert view.read(0, 8 * BLOCK) == b"".join(bytes([n]) * BLOCK for n in range(8))


def test_empty_changesets_are_points_too(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path))
    with machine.open() as store:
        for writes in (0, 5, 0, 0):
            machine.apply(store, writes=writes)
        store.merge(3, 4)
        assert_equals_images(store, machine)
        assert [point.position for point in store.points()] == [1, 2, 4]
        store.fold_to(4)
        assert_equals_images(store, machine)


steps = st.lists(
    st.sampled_from(["apply", "apply", "apply", "merge", "fold", "reopen", "rebuild", "resize"]),
    min_size=3,
    max_size=25,
)


@given(steps, st.integers(0, 1 << 32))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_point_equals_its_image_whatever_is_merged_and_folded(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(block_map, "WINDOW_BLOCKS", 7)  # so that these disks have several
        _follow(tmp_path_factory, steps, seed)


def _follow(tmp_path_factory: pytest.TempPathFactory, steps: list[str], seed: int) -> None:
    machine = RecordedMachine(str(tmp_path_factory.mktemp("store")), seed)
    store = machine.open()
    try:
        for step in steps:
            rows = store.chain().layers
            if step == "apply":
                machine.apply(store)
            elif step == "merge" and len(rows) > 1:
                low, high = sorted(machine.random.sample(range(len(rows)), 2))
                store.merge(rows[low].first, rows[high].last)
            elif step == "fold" and rows:
                store.fold_to(machine.random.choice(rows).last)
            elif step == "resize":
                machine.resize(machine.random.randrange(2), machine.random.randint(10, 80))
            elif step in ("reopen", "rebuild"):
                before = (store.chain(), store.head)
                store.close()
                if step == "rebuild":
                    store = MachineStore.rebuild(machine.root, MACHINE)
                else:
                    store = machine.open()
                assert (store.chain(), store.head) == before
        assert_equals_images(store, machine)
        head = store.head
        assert (head.position if head else 0) == machine.position
        assert store.verify() == []
    finally:
        store.close()


SPARSE = """
import sys
from appliance.applier.store import MachineStore
from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp
from tests.appliance.applier.store.recorded_machine import BLOCK, MACHINE

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

blocks = 1 << 24
with MachineStore.open(sys.argv[1], MACHINE) as store:
    with store.begin() as writer:
        writer.zero(0, 0, blocks // 2, 0)
        writer.write(0, blocks // 2, 1, b"x" * BLOCK)
        writer.zero(0, blocks // 2 + 1, blocks // 2 - 1, 2)
        bookmark = Bookmark(Stamp(1, 1), 1, Consistency.CRASH)
        writer.seal(bookmark, 0, b"b" * 16, [DiskShape(0, "sda", blocks * BLOCK)])
    before = resident_bytes()
    with store.open_view(1, 0) as view:
        assert view.read((blocks // 2 - 1) * BLOCK, 3 * BLOCK).count(b"x") == BLOCK
        grown = resident_bytes() - before
    assert grown < 16 << 20, grown
"""


def test_a_view_of_a_sparse_disk_takes_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SPARSE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_view_stays_readable_while_its_layers_are_merged_and_folded(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path))
    with machine.open() as store:
        for _ in range(8):
            machine.apply(store)
        with store.open_view(5, 0) as view:
            store.merge(3, 6)
            store.fold_to(2)
            assert view.read(0, view.size_bytes) == machine.images[5][0]
            with pytest.raises(UnavailableError, match="being read"):
                store.fold_to(7)
            assert store.chain().folding_to is None
            machine.apply(store)
            assert view.read(0, view.size_bytes) == machine.images[5][0]
        store.fold_to(7)
        assert_equals_images(store, machine)


def test_the_pin_of_a_killed_reader_is_void(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path))
    script = (
        "import sys, uuid\n"
        "from appliance.applier.store import open_reader\n"
        f"view = open_reader({str(tmp_path)!r}, uuid.UUID(int=7)).open_view(1, 0)\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with machine.open() as store:
        machine.apply(store)
        machine.apply(store)
        store.fold_to(1)
        reader = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"open\n"
            with pytest.raises(UnavailableError):
                store.fold_to(2)
        finally:
            reader.kill()
            reader.wait()
            for pipe in (reader.stdin, reader.stdout):
                if pipe is not None:
                    pipe.close()
        store.fold_to(2)
        assert_equals_images(store, machine)
        assert not list(Path(store.folder, "pins").iterdir())


def test_readers_of_another_process_see_only_whole_points(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path), sizes=(64,))
    script = (
        "import sys, uuid, xxhash\n"
        "from appliance.applier.store import open_reader\n"
        "from replication.errors import ConfigError, UnavailableError\n"
        f"reader = open_reader({str(tmp_path)!r}, uuid.UUID(int=7))\n"
        "sys.stdout.write('ready\\n'); sys.stdout.flush()\n"
        "seen = 0\n"
        "while not __import__('os').path.exists(sys.argv[1]):\n"
        "    for point in reader.points():\n"
        "        try:\n"
        "            with reader.open_view(point.position, 0) as view:\n"
        "                print(point.position, xxhash.xxh3_64_hexdigest(\n"
        "                    view.read(0, view.size_bytes)))\n"
        "        except (ConfigError, UnavailableError):\n"
        "            pass\n"
    )
    stop = tmp_path / "stop"
    with machine.open() as store:
        machine.apply(store)
        with (tmp_path / "seen").open("wb") as seen:
            reader = subprocess.Popen(
                [sys.executable, "-c", script, str(stop)], stdout=seen, stderr=subprocess.STDOUT
            )
            try:
                begun = time.monotonic() + 60
                while not (tmp_path / "seen").stat().st_size:
                    assert time.monotonic() < begun, "the reader does not begin"
                    time.sleep(0.02)
                until = time.monotonic() + 5
                while time.monotonic() < until:
                    for _ in range(4):
                        machine.apply(store)
                    rows = store.chain().layers
                    store.merge(rows[-3].first, rows[-2].last)
                    try:
                        store.fold_to(rows[0].last)
                    except UnavailableError:
                        continue
            finally:
                stop.touch()
                assert reader.wait(30) == 0
    lines = (tmp_path / "seen").read_text().splitlines()[1:]
    assert len(lines) > 20
    for line in lines:
        position, digest = line.split()
        assert xxhash.xxh3_64_hexdigest(machine.images[int(position)][0]) == digest


def test_a_thousand_positions_are_listed_at_once(tmp_path: Path) -> None:
    with MachineStore.open(str(tmp_path), MACHINE) as store:
        for number in range(1, 1001):
            seal(store, 1, number, number - 1)
        start = time.monotonic()
        assert len(open_reader(str(tmp_path), MACHINE).points()) == 1000
        assert time.monotonic() - start < 2


def test_every_refusal_is_a_replication_error(store: MachineStore) -> None:
    seal(store, 1, 1, 0)
    for call in (lambda: store.merge(1, 7), lambda: store.fold_to(5), lambda: store.verify(9)):
        with pytest.raises(ReplicationError):
            call()
