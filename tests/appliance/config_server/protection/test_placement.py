import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.protection.placement import (
    Candidate,
    PlacementError,
    choose,
    choose_disks,
)
from replication.control.report import BlockDevice

GIB = 1 << 30


def server(name: str, count: int = 0, fill: float = 0.0, trouble: str = "") -> Candidate:
    return Candidate(uuid.uuid5(uuid.NAMESPACE_DNS, name), name, count, fill, trouble)


def test_the_least_loaded_healthy_one_is_chosen() -> None:
    known = [server("a", 5), server("b", 2, 0.5), server("c", 2, 0.1), server("d", 0, 0, "away")]
    assert choose(known, None, what="process server").name == "c"


def test_one_that_is_asked_for_is_taken_by_name_or_id() -> None:
    known = [server("a", 5), server("b")]
    assert choose(known, "a", what="applier") == known[0]
    assert choose(known, str(known[0].id), what="applier") == known[0]


def test_an_id_goes_before_a_name_and_a_name_is_of_those_with_a_certificate() -> None:
    meant = server("a")
    named_alike = Candidate(uuid.UUID(int=7), str(meant.id))
    assert choose([named_alike, meant], str(meant.id), what="applier") == meant
    out = Candidate(uuid.UUID(int=8), "a", trouble="it has no certificate", is_live=False)
    assert choose([out, meant], "a", what="applier") == meant
    with pytest.raises(PlacementError, match="there is no applier a"):
        choose([out], "a", what="applier")
    with pytest.raises(PlacementError, match="has no certificate"):
        choose([out, meant], str(out.id), what="applier")


@pytest.mark.parametrize(
    ("known", "asked", "told"),
    [
        ([], None, "no applier is enrolled"),
        ([server("a", trouble="silent for 80 s")], None, "a: silent for 80 s"),
        ([server("a", trouble="silent for 80 s")], "a", "silent for 80 s"),
        ([server("a")], "b", "there is no applier b"),
        ([server("a"), server("a", 1)], "a", "more than one"),
    ],
)
def test_what_will_not_do_is_refused_with_the_reason(
    known: list[Candidate], asked: str | None, told: str
) -> None:
    with pytest.raises(PlacementError, match=told):
        choose(known, asked, what="applier")


SYSTEM = BlockDevice(id="wwn-0", device="/dev/sda", size_bytes=GIB, is_system=True)
DATA = BlockDevice(id="wwn-1", device="/dev/sdb", size_bytes=GIB)
MAPPED = BlockDevice(id="dm-0", device="/dev/dm-0", size_bytes=GIB, reason="is bio-based")


def test_all_disks_are_chosen_by_default() -> None:
    chosen = choose_disks((DATA, SYSTEM), None, {})
    assert [(disk.index, disk.device.id, disk.excluded) for disk in chosen] == [
        (0, "wwn-1", False),
        (1, "wwn-0", False),
    ]


def test_disks_that_are_not_asked_for_are_excluded_and_numbered_last() -> None:
    chosen = choose_disks((DATA, MAPPED, SYSTEM), ("/dev/sda",), {})
    assert [(disk.device.id, disk.excluded) for disk in chosen] == [
        ("wwn-0", False),
        ("wwn-1", True),
        ("dm-0", True),
    ]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (None, "cannot be tracked: is bio-based"),
        (("/dev/dm-0", "/dev/sda"), "cannot be tracked: is bio-based"),
        (("/dev/sdb",), "system disk"),
        (("/dev/sdz",), "no disk /dev/sdz"),
        ((), "at least one"),
    ],
)
def test_sets_that_will_not_do_are_refused(asked: tuple[str, ...] | None, told: str) -> None:
    with pytest.raises(PlacementError, match=told):
        choose_disks((SYSTEM, DATA, MAPPED), asked, {})


def test_a_machine_without_disks_is_refused() -> None:
    with pytest.raises(PlacementError, match="reports no disks"):
        choose_disks((), None, {})


@given(st.permutations(range(6)), st.dictionaries(st.integers(0, 8), st.integers(0, 20)))
def test_a_number_once_used_is_never_given_to_another_disk(
    order: list[int], before: dict[int, int]
) -> None:
    known = {f"wwn-{disk}": index for disk, index in before.items()}
    if len(set(known.values())) != len(known):
        return
    devices = tuple(
        BlockDevice(id=f"wwn-{disk}", device=f"/dev/{disk}", size_bytes=GIB) for disk in order
    )
    chosen = choose_disks(devices, None, known)
    numbers = {disk.device.id: disk.index for disk in chosen}
    assert len(set(numbers.values())) == len(devices)
    for name, index in numbers.items():
        assert known.get(name, index) == index
        assert name in known or index not in known.values()
