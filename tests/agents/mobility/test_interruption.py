"""Whether tracking joins on to what is remembered."""

import contextlib
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from agents.mobility.config import AgentConfig
from agents.mobility.device import DeviceIdentity
from agents.mobility.interruption import find_interruption
from agents.mobility.source import SourceDisk
from agents.mobility.stream_run import _open_disk
from agents.mobility.stream_state import Pending, StreamStateFile
from agents.mobility.tracker.ebpf import EbpfTracker
from agents.mobility.tracker.scan import ScanTracker
from replication.block_set import BlockSet
from replication.bookmark import DiskShape, Stamp
from replication.control.report import ResyncCause
from tests.agents.mobility.conftest import MakeLoopDisk, OpenDevice

MIB = 1 << 20
BLOCKS = 256


@pytest.fixture
def source(
    machine: uuid.UUID,
    loop_disk: MakeLoopDisk,
    open_device: OpenDevice,
    opened: contextlib.ExitStack,
) -> SourceDisk:
    """A disk that nobody has tracked before."""
    device = open_device(loop_disk(MIB).path)
    tracker = EbpfTracker.attach(machine, 0, device)
    opened.callback(tracker.close)
    return SourceDisk(DiskShape(0, "data", MIB), device, tracker)


def remembering(folder: Path, known: DeviceIdentity, todo: BlockSet) -> StreamStateFile:
    state = StreamStateFile(str(folder), uuid.uuid4())
    state.save({0: todo}, generation=1, committed=2, seeded=True, identities={0: known})
    return state


def test_disk_that_nobody_knows_is_no_interruption(source: SourceDisk, tmp_path: Path) -> None:
    state = remembering(tmp_path, source.device.identity, BlockSet(BLOCKS))
    assert find_interruption([replace(source, shape=DiskShape(1, "new", MIB))], state) is None


def test_tracker_that_began_anew_has_lost_changes_unless_all_is_to_do(
    source: SourceDisk, tmp_path: Path
) -> None:
    assert source.tracker.fresh
    identity = source.device.identity
    found = find_interruption([source], remembering(tmp_path, identity, BlockSet(BLOCKS)))
    assert found is not None
    assert (found.cause, "data" in found.reason) == (ResyncCause.TRACKING_LOST, True)
    assert (
        find_interruption([source], remembering(tmp_path, identity, BlockSet.full(BLOCKS))) is None
    )
    pending = remembering(tmp_path, identity, BlockSet.full(BLOCKS))
    pending.save(pending=Pending(Stamp(1, 1), bytes(16), whole=True))
    assert find_interruption([source], pending) is not None  # it may be done already
    pending.save(pending=None)
    source.tracker.swap()
    source.tracker.forget()
    assert find_interruption([source], remembering(tmp_path, identity, BlockSet(BLOCKS))) is None


@pytest.mark.parametrize(
    ("before", "cause"),
    [
        ({"size_bytes": MIB // 2}, ResyncCause.DISK_RESIZED),
        ({"boot_id": "another"}, ResyncCause.UNCLEAN_SHUTDOWN),
        ({"backing": "another"}, ResyncCause.DISKS_CHANGED),
        ({"diskseq": 1 << 50}, ResyncCause.DISKS_CHANGED),
    ],
)
def test_each_difference_has_its_cause(
    before: dict[str, object], cause: ResyncCause, source: SourceDisk, tmp_path: Path
) -> None:
    then = replace(source.device.identity, **before)  # type: ignore[arg-type]
    found = find_interruption([source], remembering(tmp_path, then, BlockSet(BLOCKS)))
    assert found is not None
    assert found.cause is cause


def test_scan_outlives_a_reboot_as_long_as_its_digests_are_there(
    loop_disk: MakeLoopDisk, open_device: OpenDevice, tmp_path: Path
) -> None:
    device = open_device(loop_disk(MIB).path)
    tracker = ScanTracker.attach(device, str(tmp_path / "digests"))
    disk = SourceDisk(DiskShape(0, "data", MIB), device, tracker)
    state = remembering(tmp_path, replace(device.identity, boot_id="another"), BlockSet(BLOCKS))
    found = find_interruption([disk], state)
    assert found is not None
    assert found.cause is ResyncCause.TRACKING_LOST
    tracker.swap()
    tracker.forget()
    assert find_interruption([disk], state) is None


def test_digests_do_not_outlast_another_way_of_tracking(
    machine: uuid.UUID, loop_disk: MakeLoopDisk, tmp_path: Path
) -> None:
    """A block that changed, was sent, and changed back would look as if nothing had happened."""
    loop = loop_disk(MIB)
    state = StreamStateFile(str(tmp_path), machine)

    def opened(tracker: str) -> contextlib.AbstractContextManager[SourceDisk]:
        config = AgentConfig.model_validate(
            {
                "machine": str(machine),
                "data_key_file": "none",
                "state_folder": str(tmp_path),
                "process_server": "https://localhost",
                "tls": {"certificate": "none", "key": "none", "ca": "none"},
                "disks": [{"index": 0, "device": loop.path}],
                "tracker": tracker,
            }
        )
        return _open_disk(config, config.disks[0], state)

    def taken(disk: SourceDisk) -> list[int]:
        marked = disk.tracker.swap()
        state.save({0: BlockSet(BLOCKS)}, generation=1, identities={0: disk.device.identity})
        disk.tracker.forget()
        return [block for first, count in marked.runs() for block in range(first, first + count)]

    loop.write([5], b"a")
    with opened("scan") as disk:
        assert taken(disk) == [5]
    with opened("ebpf") as disk:
        found = find_interruption([disk], state)
        assert found is not None
        assert found.cause is ResyncCause.TRACKING_LOST
        taken(disk)
        loop.write([5], b"b")
        assert taken(disk) == [5]  # and sent
    loop.write([5], b"a")
    with opened("scan") as disk:
        found = find_interruption([disk], state)
        assert found is not None or taken(disk) == [5]
