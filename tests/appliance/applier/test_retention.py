import collections
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.applier.retention import Candidate, RetentionPolicy, kept
from replication.bookmark import Consistency

SECOND = 1_000_000_000
HOUR = 3600 * SECOND
DAY = 24 * HOUR
NOW = 20_000 * DAY + 5 * HOUR


def series(ages_ns: list[int], consistency: Consistency = Consistency.CRASH) -> list[Candidate]:
    times = sorted(NOW - age for age in ages_ns)
    return [Candidate(nth + 1, time, consistency) for nth, time in enumerate(times)]


def ages_kept(points: list[Candidate], policy: RetentionPolicy) -> list[float]:
    chosen = kept(points, NOW, policy)
    return sorted(
        round((NOW - point.time_ns) / HOUR, 6) for point in points if point.position in chosen
    )


def every(step_ns: int, until_ns: int) -> list[int]:
    return list(range(0, until_ns + 1, step_ns))


def steps(ages: list[float]) -> set[float]:
    """Distances between neighbours, without the last one: the window may cut its bucket."""
    return {round(b - a, 6) for a, b in itertools.pairwise(ages[:-1])}


policies = st.builds(
    RetentionPolicy,
    retention_days=st.integers(0, 15),
    crash_frequency_seconds=st.sampled_from([0, 60, 300]),
)
histories = st.lists(
    st.tuples(st.integers(0, 17 * DAY), st.sampled_from(list(Consistency))), max_size=120
).map(
    lambda rows: [
        Candidate(nth + 1, NOW - age, consistency)
        for nth, (age, consistency) in enumerate(sorted(rows, key=lambda row: -row[0]))
    ]
)


def test_two_hours_keep_one_point_per_five_minutes() -> None:
    points = series(every(60 * SECOND, HOUR))
    assert len(kept(points, NOW, RetentionPolicy())) in (13, 14)
    every_one = RetentionPolicy(crash_frequency_seconds=0)
    assert len(kept(points, NOW, every_one)) == len(points)


def test_every_app_consistent_point_of_two_hours_is_kept() -> None:
    points = series(every(60 * SECOND, HOUR), Consistency.APP)
    assert len(kept(points, NOW, RetentionPolicy())) == len(points)


def test_zero_days_keep_the_latest_alone() -> None:
    points = series(every(300 * SECOND, DAY))
    assert kept(points, NOW, RetentionPolicy(retention_days=0)) == {points[-1].position}


def test_one_day_keeps_one_per_hour() -> None:
    ages = ages_kept(series(every(300 * SECOND, 2 * DAY)), RetentionPolicy(retention_days=1))
    older = [age for age in ages if age > 3]
    assert max(ages) <= 24
    assert len(older) in (20, 21)
    assert steps(older) == {1}


def test_three_days_keep_one_per_two_hours() -> None:
    ages = ages_kept(series(every(300 * SECOND, 5 * DAY)), RetentionPolicy(retention_days=3))
    older = [age for age in ages if age > 4]
    assert max(ages) <= 72
    assert steps(older) == {2}


def test_fifteen_days_keep_one_per_four_hours_after_a_week() -> None:
    ages = ages_kept(series(every(300 * SECOND, 20 * DAY)), RetentionPolicy(retention_days=15))
    week = [age for age in ages if 4 < age <= 7 * 24]
    rest = [age for age in ages if age > 7 * 24 + 4]
    assert max(ages) <= 15 * 24
    assert steps(week) == {2}
    assert steps(rest) == {4}


def test_old_points_stay_when_no_new_ones_arrive() -> None:
    points = series(every(HOUR, DAY))
    policy = RetentionPolicy(retention_days=1)
    assert kept(points, NOW + 100 * DAY, policy) == kept(points, NOW, policy)


def test_a_time_in_the_future_does_not_age_the_others() -> None:
    points = series(every(HOUR, DAY))
    strayed = Candidate(1000, NOW + 365 * DAY, Consistency.CRASH)
    policy = RetentionPolicy(retention_days=1)
    assert kept([*points, strayed], NOW, policy) >= kept(points, NOW, policy)


@given(histories, policies)
@settings(max_examples=200, deadline=None)
def test_thinning_again_at_the_same_time_changes_nothing(
    points: list[Candidate], policy: RetentionPolicy
) -> None:
    first = kept(points, NOW, policy)
    left = [point for point in points if point.position in first]
    assert kept(left, NOW, policy) == first


@given(histories, policies)
@settings(max_examples=200, deadline=None)
def test_the_newest_is_kept_and_nothing_inconsistent(
    points: list[Candidate], policy: RetentionPolicy
) -> None:
    chosen = kept(points, NOW, policy)
    restorable = [point for point in points if point.consistency.restorable]
    assert chosen <= {point.position for point in restorable}
    assert not restorable or restorable[-1].position in chosen


@given(histories, policies, st.sets(st.integers(0, 121)))
@settings(max_examples=200, deadline=None)
def test_what_is_held_is_kept_and_changes_nothing_else(
    points: list[Candidate], policy: RetentionPolicy, held: set[int]
) -> None:
    restorable = {point.position for point in points if point.consistency.restorable}
    chosen = kept(points, NOW, policy, held)
    assert chosen == kept(points, NOW, policy) | (held & restorable)


@given(histories, policies)
@settings(max_examples=200, deadline=None)
def test_no_bucket_holds_more_than_the_table_allows(
    points: list[Candidate], policy: RetentionPolicy
) -> None:
    chosen = kept(points, NOW, policy)
    restorable = [point for point in points if point.consistency.restorable]
    if not restorable or policy.retention_days == 0:
        assert len(chosen) <= 1
        return
    reference = restorable[-1].time_ns
    hours = 1 if policy.retention_days == 1 else 2
    fine: collections.Counter[int] = collections.Counter()
    coarse: collections.Counter[int] = collections.Counter()
    for point in restorable[:-1]:
        age = reference - point.time_ns
        if point.position not in chosen:
            continue
        assert age <= policy.retention_days * DAY
        if age >= 2 * HOUR + hours * HOUR:
            fine[point.time_ns // (hours * HOUR)] += 1
        if policy.retention_days > 7 and age >= 7 * DAY + 4 * HOUR:
            coarse[point.time_ns // (4 * HOUR)] += 1
    assert all(count <= 1 for count in fine.values())
    assert all(count <= 1 for count in coarse.values())
