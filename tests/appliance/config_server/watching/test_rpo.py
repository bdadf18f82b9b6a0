"""RPO by the source's clock: no clock of anybody else counts."""

from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.watching.rpo import NS, Sighting, rpo_seconds

INSTANT = st.integers(min_value=10**18, max_value=2 * 10**18)
SKEW = st.integers(min_value=-(10**17), max_value=10**17)
SPAN = st.integers(min_value=0, max_value=10**16)


@given(bookmark=INSTANT, age=SPAN, elapsed=SPAN, skew=SKEW)
def test_skew_does_not_count(bookmark: int, age: int, elapsed: int, skew: int) -> None:
    """Whatever our clock says: what passed at the source, and here since the report."""
    source_ns = bookmark + age
    received_ns = source_ns - skew
    found = rpo_seconds(bookmark, Sighting(source_ns, received_ns), received_ns + elapsed)
    assert found == (age + elapsed) / NS


@given(bookmark=INSTANT, source=INSTANT, received=INSTANT, now=INSTANT)
def test_it_is_never_negative_and_never_below_what_the_source_said(
    bookmark: int, source: int, received: int, now: int
) -> None:
    found = rpo_seconds(bookmark, Sighting(source, received), now)
    assert found is not None
    assert found >= 0
    assert found >= (source - bookmark) / NS


@given(
    sighting=st.builds(Sighting, INSTANT, INSTANT),
    now=INSTANT,
    later=SPAN,
    bookmark=INSTANT,
    newer=SPAN,
)
def test_it_grows_with_time_and_falls_with_a_newer_bookmark(
    sighting: Sighting, now: int, later: int, bookmark: int, newer: int
) -> None:
    found = rpo_seconds(bookmark, sighting, now)
    after = rpo_seconds(bookmark, sighting, now + later)
    fresher = rpo_seconds(bookmark + newer, sighting, now)
    assert found is not None
    assert after is not None
    assert fresher is not None
    assert after >= found >= fresher


@given(bookmark=INSTANT, age=SPAN, jump=SKEW)
def test_a_jump_of_our_own_clock_is_gone_with_the_next_report(
    bookmark: int, age: int, jump: int
) -> None:
    source_ns = bookmark + age
    before = rpo_seconds(bookmark, Sighting(source_ns, source_ns), source_ns)
    after = rpo_seconds(bookmark, Sighting(source_ns, source_ns + jump), source_ns + jump)
    assert before == after


@given(bookmark=INSTANT, back=SPAN)
def test_a_bookmark_from_before_the_source_was_set_back_counts_as_now(
    bookmark: int, back: int
) -> None:
    assert rpo_seconds(bookmark, Sighting(bookmark - back, 10**18), 10**18) == 0


def test_without_a_bookmark_there_is_none() -> None:
    assert rpo_seconds(0, Sighting(10**18, 10**18), 10**18) is None


def test_skew_is_the_source_less_ours() -> None:
    assert Sighting(7 * NS, 5 * NS).skew_ns == 2 * NS
