"""A value that flaps makes one event; one that lasts makes one, too."""

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.watching.hysteresis import Mark, Settling, follow
from appliance.config_server.watching.reason import Severity
from appliance.config_server.watching.rpo import NS

SETTLING = Settling(settle_seconds=20, clear_seconds=60)
SEEN = st.sampled_from([None, Severity.WARNING, Severity.CRITICAL])
LOOKS = st.lists(st.tuples(st.integers(1, 30), SEEN), max_size=200)


def watch(looks: Sequence[tuple[int, Severity | None]]) -> list[tuple[int, Severity | None]]:
    """What is open after each look, with its time."""
    mark, now, told = Mark(), 10**9, []
    for seconds, seen in looks:
        now += seconds
        mark = follow(mark, seen, now * NS, SETTLING)
        told.append((now, mark.open))
    return told


@given(looks=LOOKS)
def test_changes_are_no_closer_than_the_time_they_must_last(
    looks: list[tuple[int, Severity | None]],
) -> None:
    told = watch(looks)
    changes = [
        (now, before, after)
        for (_, before), (now, after) in zip([(0, None), *told], told, strict=False)
        if before is not after
    ]
    for (earlier, _, _), (later, before, after) in pairwise(changes):
        worse = after is not None and (before is None or after.rank > before.rank)
        assert later - earlier >= (20 if worse else 60)


@given(looks=LOOKS, last=SEEN)
def test_what_lasts_is_told(
    looks: list[tuple[int, Severity | None]], last: Severity | None
) -> None:
    assert watch([*looks, *[(10, last)] * 14])[-1][1] is last


@given(looks=LOOKS)
def test_what_is_opened_was_seen(looks: list[tuple[int, Severity | None]]) -> None:
    """No event of a severity that nobody has seen in the last settling time."""
    told = watch(looks)
    for index, ((_, before), (_, after)) in enumerate(zip([(0, None), *told], told, strict=False)):
        if before is not after:
            assert looks[index][1] is after


def test_flapping_opens_once_and_stays() -> None:
    flapping = [(5, Severity.WARNING if index % 3 else None) for index in range(100)]
    told = [found for _, found in watch([(5, Severity.WARNING)] * 6 + flapping)]
    assert told.count(None) == 4
    assert told[-1] is Severity.WARNING


def test_flapping_that_never_lasts_opens_nothing() -> None:
    looks = [(5, Severity.CRITICAL if index % 4 else None) for index in range(100)]
    assert {found for _, found in watch(looks)} == {None}


def test_edges_of_settling_and_clearing() -> None:
    opened = follow(Mark(None, 1, 0), Severity.CRITICAL, 20 * NS, SETTLING)
    assert opened == Mark(Severity.CRITICAL)
    pending = follow(Mark(None, 1, 0), Severity.CRITICAL, 20 * NS - 1, SETTLING)
    assert pending == Mark(None, 1, 0)
    assert follow(Mark(Severity.WARNING, -1, 0), None, 60 * NS, SETTLING).is_idle
    assert follow(Mark(Severity.WARNING, -1, 0), None, 60 * NS - 1, SETTLING).open


def test_a_clock_that_is_set_back_starts_the_waiting_anew() -> None:
    late = Mark(None, 1, 1000 * NS)
    mark = follow(late, Severity.WARNING, 10 * NS, SETTLING)
    assert mark == Mark(None, 1, 10 * NS)
    assert follow(mark, Severity.WARNING, 30 * NS, SETTLING).open is Severity.WARNING


def test_warning_that_gets_critical_is_told_as_critical() -> None:
    told = watch([(10, Severity.WARNING)] * 4 + [(10, Severity.CRITICAL)] * 4)
    assert [found for _, found in told] == [
        None, None, Severity.WARNING, Severity.WARNING,
        Severity.WARNING, Severity.WARNING, Severity.CRITICAL, Severity.CRITICAL,
    ]  # fmt: skip
