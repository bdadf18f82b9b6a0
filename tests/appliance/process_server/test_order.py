import uuid
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.process_server.order import NO_DIGEST, Position, Verdict, judge_commit, judge_segment
from replication.bookmark import NOTHING, Bookmark, Consistency, DiskShape, Stamp
from replication.errors import OutOfOrderError
from replication.manifest import Manifest

A, B = b"a" * 16, b"b" * 16
MACHINE = uuid.UUID(int=7)

stamps = st.builds(Stamp, st.integers(1, 4), st.integers(1, 6))
positions = st.builds(
    lambda committed, applied, attempt, digest: Position(
        max(committed, applied), attempt, digest, min(committed, applied)
    ),
    st.one_of(st.just(NOTHING), stamps),
    st.one_of(st.just(NOTHING), stamps),
    st.sampled_from((A, B)),
    st.sampled_from((A, B, NO_DIGEST)),
)


def make_manifest(
    stamp: Stamp, since: int, *, attempt: bytes = A, applied: Stamp = NOTHING
) -> Manifest:
    return Manifest(
        machine=MACHINE,
        bookmark=Bookmark(stamp, 2, Consistency.CRASH),
        since=since,
        attempt=attempt,
        disks=(DiskShape(0, "disk", 512),),
        segments=(),
        changed_bytes=0,
        captured_ns=1,
        applied=applied,
    )


manifests = st.builds(
    lambda stamp, since, attempt, applied: make_manifest(
        stamp, min(since, stamp.number - 1), attempt=attempt, applied=applied
    ),
    stamps,
    st.integers(0, 6),
    st.sampled_from((A, B)),
    st.one_of(st.just(NOTHING), stamps),
)


@given(positions, manifests)
def test_commit_follows_exactly_where_the_format_says(
    position: Position, manifest: Manifest
) -> None:
    newest = max(position.committed, manifest.applied)
    stamp, since = manifest.stamp, manifest.since
    continues = stamp.generation == newest.generation and since <= newest.number and stamp > newest
    begins = stamp.generation > newest.generation and since == 0
    try:
        verdict = judge_commit(position, manifest, A)
    except OutOfOrderError:
        assert not continues
        assert not begins
    else:
        if verdict is Verdict.REPEATED:
            assert (stamp, manifest.attempt) == (position.committed, position.attempt)
        else:
            assert continues or begins
            assert stamp > position.committed


@given(positions, manifests)
def test_same_manifest_again_is_a_success_and_another_is_not(
    position: Position, manifest: Manifest
) -> None:
    after = position.after_commit(manifest, A)
    assert judge_commit(after, manifest, A) is Verdict.REPEATED
    with pytest.raises(OutOfOrderError, match="another manifest"):
        judge_commit(after, manifest, B)
    with pytest.raises(OutOfOrderError, match="another manifest"):
        judge_commit(after, replace(manifest, attempt=b"c" * 16), A)


@given(positions, stamps)
def test_segment_is_taken_only_if_its_changeset_may_still_come(
    position: Position, stamp: Stamp
) -> None:
    refused = stamp <= position.committed
    try:
        judge_segment(position, stamp)
    except OutOfOrderError:
        assert refused
    else:
        assert not refused


@given(positions, st.one_of(st.just(NOTHING), stamps))
def test_watermark_takes_nothing_back_and_acknowledges_nothing(
    position: Position, applied: Stamp
) -> None:
    after = position.after_applied(applied)
    assert replace(after, applied=position.applied) == position
    assert after.applied == max(position.applied, min(applied, position.committed))


@given(positions, stamps, st.integers(1, 6))
def test_falling_back_never_raises_what_is_acknowledged(
    position: Position, applied: Stamp, number: int
) -> None:
    if position.awaits(number, applied):
        after = position.fallen_back(applied, B)
        assert after.committed == after.applied == applied < position.committed
