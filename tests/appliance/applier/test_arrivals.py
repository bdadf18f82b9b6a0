from hypothesis import given
from hypothesis import strategies as st

from appliance.applier.arrivals import Arrivals
from replication.watermark import RepairRun

extents = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=6).map(
    lambda rows: sorted(_apart(rows))
)


def _apart(rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    taken: set[int] = set()
    found = []
    for block, count in rows:
        blocks = set(range(block, block + count))
        if not blocks & taken:
            taken |= blocks
            found.append((block, count))
    return found


@given(st.integers(0, 40), st.integers(1, 12), st.lists(extents, max_size=4))
def test_a_run_has_come_when_each_of_its_blocks_has(
    block: int, count: int, changesets: list[list[tuple[int, int]]]
) -> None:
    run, other = RepairRun(0, block, count), RepairRun(1, block, count)
    arrivals = Arrivals()
    arrivals.expect([run, other])
    missing = set(range(block, block + count))
    for changeset in changesets:
        arrivals.take(0, changeset)
        missing -= {b for first, length in changeset for b in range(first, first + length)}
        assert arrivals.have_come(run) is not bool(missing)
        assert not arrivals.have_come(other)


def test_extents_count_for_the_runs_that_are_named() -> None:
    before, found_meanwhile = RepairRun(0, 5, 2), RepairRun(0, 6, 4)
    arrivals = Arrivals()
    arrivals.expect([before])
    expected = arrivals.expected
    arrivals.expect([found_meanwhile])
    arrivals.take(0, [(0, 100)], expected)
    assert arrivals.have_come(before)
    assert not arrivals.have_come(found_meanwhile)


def test_what_came_before_it_was_expected_does_not_count() -> None:
    run = RepairRun(0, 5, 2)
    arrivals = Arrivals()
    arrivals.take(0, [(0, 100)])
    assert not arrivals.have_come(run)
    arrivals.keep([run])
    assert not arrivals.have_come(run)
    arrivals.take(0, [(5, 2)])
    assert arrivals.have_come(run)
    arrivals.expect([run])
    assert not arrivals.have_come(run)
    arrivals.keep([])
    assert not arrivals.have_come(run)
