"""Bytes that changed where nobody should have changed them are found, named, and mended."""

import contextlib
import os
import time
from pathlib import Path

import pytest

from appliance.applier.store import RottenBlockError
from replication.block_set import BLOCK_BYTES
from tests.e2e.disk import Disk
from tests.e2e.rig import Rig

_MIB = 1 << 20
DISK_BYTES = 16 * _MIB
CHUNK_COUNT = DISK_BYTES >> 16
MENDED_BYTES_MAX = _MIB
"""Of sixteen: what differs is sent, not the disk."""


@pytest.fixture
def disk(rig: Rig) -> Disk:
    """A raw disk full of bytes that do not shrink, whose audit covers it with every changeset."""
    made = rig.add_disk(DISK_BYTES)
    rig.settings["agent"] = {"capture": {"audit_chunks": CHUNK_COUNT, "heartbeat_seconds": 1.0}}
    made.write(0, os.urandom(DISK_BYTES))
    return made


def test_blocks_changed_behind_the_tracker_are_found_and_sent_again(rig: Rig, disk: Disk) -> None:
    rig.start()
    rig.wait_for_point()
    rig.assert_newest_equals_source()
    sent_bytes = rig.agent_status()["sent_bytes"]
    blocks = [5, 6, 777, 4095]
    fd = os.open(disk.image, os.O_RDWR)
    for block in blocks:
        os.pwrite(fd, os.urandom(BLOCK_BYTES), block * BLOCK_BYTES)
    os.close(fd)
    rig.wait_until("three events", lambda: len(rig.events()) >= 3)
    rig.wait_until("repair", lambda: _newest_has(rig, disk, blocks))
    rig.assert_newest_equals_source()
    told = [event["message"] for event in rig.events()]
    assert {event["code"] for event in rig.events()} == {"differs"}
    assert len(told) == 3
    for chunk in (0, 777 // 16, 4095 // 16):
        assert any(f"chunk {chunk} of disk 0" in message for message in told)
    assert rig.agent_status()["sent_bytes"] - sent_bytes < MENDED_BYTES_MAX
    rig.assert_one_unbroken_stream()


@pytest.mark.parametrize(("place", "finder"), [("layers/", "audit"), ("base.img", "scrub")])
def test_a_flipped_byte_at_rest_is_refused_and_mended(
    rig: Rig, disk: Disk, place: str, finder: str
) -> None:
    if place == "base.img":
        rig.settings["applier"] = {"retention": {"retention_days": 0}}
    if finder == "scrub":
        rig.settings["agent"]["capture"]["audit_chunks"] = 0
    rig.start()
    rig.wait_for_point()
    block = 1234
    disk.write((block - 100) * BLOCK_BYTES, os.urandom(200 * BLOCK_BYTES))
    rig.assert_newest_equals_source()
    rig.wait_until(f"block {block} in {place}", lambda: place in _place(rig, block)[0])
    rig.applier.stop()
    sent_bytes = rig.agent_status()["sent_bytes"]
    file, offset = _place(rig, block)
    _flip(rig.store / "machines" / str(rig.machine) / file, offset + 1000)
    rotten = rig.points()[-1]
    with (
        rig.reader().open_view(rotten.position, 0) as view,
        pytest.raises(RottenBlockError, match=f"block {block} of disk 0.*{file}"),
    ):
        view.read((block - 8) * BLOCK_BYTES, _MIB)
    rig.applier.start()
    rig.wait_until("the damage to be found", rig.events)
    rig.wait_until("repair", lambda: _newest_has(rig, disk, [block]))
    rig.assert_newest_equals_source()
    # What has read it reports it, and so does who looks for it: once or twice, by who comes first.
    assert {event["code"] for event in rig.events()} == {"rotten"}
    assert f"block {block} of disk 0" in rig.events()[0]["message"]
    assert file in rig.events()[0]["message"]
    assert rig.agent_status()["sent_bytes"] - sent_bytes < MENDED_BYTES_MAX
    rig.assert_one_unbroken_stream()
    if rotten.position in [point.position for point in rig.points()]:
        # Refused, or healed by what has come: never the flipped byte.
        with (
            rig.reader().open_view(rotten.position, 0) as view,
            contextlib.suppress(RottenBlockError),
        ):
            _assert_reads(view.read(block * BLOCK_BYTES, BLOCK_BYTES), disk, block)


def test_a_flipped_byte_in_the_cache_is_refused_and_put_again(rig: Rig, disk: Disk) -> None:
    rig.start()
    rig.wait_for_point()
    rig.applier.stop()
    for _ in range(2):  # one for its segment, one for its manifest
        disk.write(8 * _MIB, os.urandom(_MIB))
        _wait_until_durable(rig, time.time_ns())
    applied = rig.positions()[-1].bookmark.stamp.number  # may be in the spool for a moment still
    changesets = [
        folder
        for folder in sorted((rig.spool / str(rig.machine)).glob("*/*"))
        if int(folder.name) > applied
    ]
    spooled = [file for folder in changesets for file in folder.rglob("000000.*")]
    manifests = [file for folder in changesets for file in folder.rglob("manifest")]
    assert spooled
    _flip_in_cache(rig, spooled[0].read_bytes())
    _flip_in_cache(rig, manifests[-1].read_bytes())
    rig.applier.start()
    rig.wait_until(
        "both to be found",
        lambda: {"segment", "manifest"} <= {event["code"] for event in rig.events()},
    )
    rig.assert_newest_equals_source()
    rig.assert_one_unbroken_stream()
    assert rig.process_server.metric("understudy_uploads_repeated_total") >= 2
    assert any("/000000: " in event["message"] for event in rig.events())


def _wait_until_durable(rig: Rig, since_ns: int) -> None:
    rig.wait_until("a changeset in the cache", lambda: rig.agent_status()["durable_ns"] > since_ns)


def _assert_reads(data: bytes | memoryview, disk: Disk, block: int) -> None:
    with disk.image.open("rb") as image:
        image.seek(block * BLOCK_BYTES)
        assert bytes(data) == image.read(BLOCK_BYTES)


def _newest_has(rig: Rig, disk: Disk, blocks: list[int]) -> bool:
    """Whether the newest point's blocks are what the image holds."""
    with (
        rig.reader().open_view(rig.points()[-1].position, disk.index) as view,
        disk.image.open("rb") as image,
    ):
        for block in blocks:
            image.seek(block * BLOCK_BYTES)
            try:
                found = view.read(block * BLOCK_BYTES, BLOCK_BYTES)
            except RottenBlockError:
                return False
            if found != image.read(BLOCK_BYTES):
                return False
    return True


def _place(rig: Rig, block: int) -> tuple[str, int]:
    """The store's file and the offset in it from which the newest point reads a block."""
    with rig.reader().open_view(rig.points()[-1].position, 0) as view:
        return view._place(block)


def _flip(path: Path, offset: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, offset)[0]
        os.pwrite(fd, bytes([byte ^ 0x10]), offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def _flip_in_cache(rig: Rig, content: bytes) -> None:
    """Flip a byte in the middle of the blob that has this content, in Azurite's own file."""
    found = 0
    for path in rig.azurite_data.rglob("__blobstorage__/*"):
        offset = path.read_bytes().find(content)
        if offset >= 0:
            _flip(path, offset + len(content) // 2)
            found += 1
    assert found == 1
