"""Every recovery point is one instant of all disks."""

import pytest

from tests.e2e.order import (
    assert_files_hold_prefix,
    is_restorable,
    raw_prefix,
    record_files,
    writing,
)
from tests.e2e.rig import Rig

_MIB = 1 << 20
DISK_BYTES = 320 * _MIB
RAW_BYTES = 8 * _MIB


def test_every_point_of_two_disks_holds_a_prefix(rig: Rig) -> None:
    check_order(rig, "xfs", point_count=25)


@pytest.mark.soak
@pytest.mark.parametrize("second", ["ext4", "xfs"])
def test_two_hundred_points_hold_a_prefix(rig: Rig, second: str) -> None:
    check_order(rig, second, point_count=200)


def check_order(rig: Rig, second: str, *, point_count: int) -> None:
    disks = [rig.add_disk(DISK_BYTES, kind, in_memory=True) for kind in ("ext4", second)]
    rig.start()
    rig.wait_for_point()
    before = len(rig.points())
    with writing("files", *record_files(disks)):
        rig.wait_until(
            f"{point_count} points under load",
            lambda: len(rig.points()) >= before + point_count,
            seconds_max=60 + 3 * point_count,
        )
        under_load = rig.points()[before : before + point_count]
    newest = [assert_files_hold_prefix(rig, point, rig.scratch()) for point in under_load]
    assert newest == sorted(newest)
    assert len(set(newest)) > point_count / 2, "the points show no progress"
    for disk in disks:
        disk.unmount()
    rig.assert_newest_equals_source()
    rig.assert_one_unbroken_stream()


def test_raw_disk_claims_consistency_only_for_a_prefix(rig: Rig) -> None:
    check_raw(rig, point_count=8)


@pytest.mark.soak
def test_raw_disk_claims_consistency_only_for_a_prefix_for_long(rig: Rig) -> None:
    check_raw(rig, point_count=200)


def check_raw(rig: Rig, *, point_count: int) -> None:
    disk = rig.add_disk(RAW_BYTES, in_memory=True)
    rig.start()
    rig.wait_for_point()
    seen: dict[int, bool] = {}
    held: list[int] = []

    def look() -> bool:
        for point in rig.positions():
            if point.position in seen:
                continue
            seen[point.position] = is_restorable(point)
            if is_restorable(point):
                newest, wrong = raw_prefix(rig, point, disk)
                assert not wrong, f"{point.bookmark} claims consistency; {newest}: {wrong[:10]}"
                held.append(newest)
        return len(held) >= point_count and not all(seen.values())

    with writing("raw", disk.device, str(RAW_BYTES // 4096)):
        rig.wait_until(f"{point_count} consistent points", look, 60 + 4 * point_count)
    assert len(set(held)) >= point_count / 4, "the points show no progress"
    rig.assert_newest_equals_source()
    rig.assert_one_unbroken_stream()
