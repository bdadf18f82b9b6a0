from hypothesis import given
from hypothesis import strategies as st

from appliance.applier.succession import DAMAGED, UNREAD, Apply, Gap, Idle, Read, Unread, follow
from replication.bookmark import NOTHING, Stamp
from replication.watermark import WANTED_COUNT_MAX


def of(generation: int, **since: int | Unread) -> dict[Stamp, int | Unread]:
    return {Stamp(generation, int(number[1:])): value for number, value in since.items()}


def test_nothing_new_is_idle() -> None:
    assert follow(Stamp(1, 3), {}) == Idle()
    assert follow(Stamp(1, 3), of(1, n1=0, n2=1, n3=2)) == Idle()


def test_next_number_is_applied_once_it_is_read() -> None:
    assert follow(Stamp(1, 3), of(1, n4=UNREAD, n5=UNREAD)) == Read(Stamp(1, 4))
    assert follow(Stamp(1, 3), of(1, n4=3, n5=UNREAD)) == Apply(Stamp(1, 4))


def test_gap_names_what_is_missing_up_to_the_nearest_since() -> None:
    found = follow(Stamp(1, 3), of(1, n7=6, n9=5))
    assert found == Gap((Stamp(1, 4), Stamp(1, 5)))


def test_later_superset_bridges_a_gap() -> None:
    assert follow(Stamp(1, 3), of(1, n5=4, n6=UNREAD)) == Read(Stamp(1, 6))
    assert follow(Stamp(1, 3), of(1, n5=4, n6=2)) == Apply(Stamp(1, 6))


def test_damaged_manifest_is_missing_unless_it_is_bridged() -> None:
    assert follow(Stamp(1, 3), of(1, n4=DAMAGED)) == Gap((Stamp(1, 4),))
    assert follow(Stamp(1, 3), of(1, n4=DAMAGED, n5=4)) == Gap((Stamp(1, 4),))
    assert follow(Stamp(1, 3), of(1, n4=DAMAGED, n5=3)) == Apply(Stamp(1, 5))


def test_newer_generation_goes_first_and_older_is_passed_over() -> None:
    both = of(1, n4=3) | of(2, n1=0)
    assert follow(Stamp(1, 3), both) == Apply(Stamp(2, 1))
    assert follow(Stamp(2, 1), both) == Idle()


def test_newer_generation_that_cannot_begin_leaves_the_older_one_its_turn() -> None:
    both = of(1, n4=3) | of(2, n2=1)
    assert follow(Stamp(1, 3), both) == Apply(Stamp(1, 4))
    assert follow(Stamp(1, 4), both) == Gap((Stamp(2, 1),))


def test_first_changeset_of_all_needs_no_head() -> None:
    assert follow(NOTHING, of(1, n1=0)) == Apply(Stamp(1, 1))


def test_gap_is_bounded() -> None:
    found = follow(Stamp(1, 0), of(1, n9000000=8999999))
    assert isinstance(found, Gap)
    assert len(found.missing) == WANTED_COUNT_MAX


stamps = st.builds(Stamp, st.integers(1, 3), st.integers(1, 12))
sinces = st.one_of(st.just(UNREAD), st.just(DAMAGED), st.integers(0, 11))


@given(st.builds(Stamp, st.integers(0, 3), st.integers(0, 12)), st.dictionaries(stamps, sinces))
def test_what_is_applied_always_follows_the_head(
    head: Stamp, manifests: dict[Stamp, int | Unread]
) -> None:
    match follow(head, manifests):
        case Apply(stamp):
            since = manifests[stamp]
            assert isinstance(since, int)
            assert stamp > head
            assert since <= (head.number if stamp.generation == head.generation else 0)
        case Read(stamp):
            assert manifests[stamp] is UNREAD
        case Gap(missing):
            assert all(manifests.get(stamp, DAMAGED) is DAMAGED for stamp in missing)
        case Idle():
            assert all(stamp <= head for stamp in manifests)
