"""Changesets through a cache into recovery points, and all that can be wrong with them."""

import asyncio

import pytest

from daemon.service import Service
from replication.bookmark import Consistency, Stamp
from tests.appliance.applier.running import Site, until
from tests.appliance.applier.source import a_source


async def test_every_point_holds_what_the_source_had(any_site: Site) -> None:
    source = a_source()
    changesets = []
    async with any_site.applier(source):
        for _ in range(6):
            changesets.append(source.changeset())
            await changesets[-1].put(any_site.account)
            source.scribble()
        watermark = await any_site.until_applied(source, Stamp(1, 6))
    assert watermark.attempt == changesets[-1].manifest.attempt
    assert watermark.restorable_ns == changesets[-1].manifest.bookmark.time_ns
    assert (watermark.wanted, watermark.repair.request, watermark.lost) == ((), 0, "")
    any_site.check(source, *changesets)
    assert any_site.events(source) == ""


async def test_later_frame_of_a_changeset_wins(site: Site) -> None:
    source = a_source()
    changeset = source.changeset(stale=40)
    await changeset.put(site.account)
    async with site.applier(source):
        await site.until_applied(source, Stamp(1, 1))
    site.check(source, changeset)


async def test_flipped_segment_is_refused_asked_for_and_applied_when_put_again(
    any_site: Site,
) -> None:
    source = a_source()
    changeset = source.changeset()
    await changeset.put(any_site.account)
    name, segment = changeset.segment_name(1), bytearray(changeset.segments[1])
    segment[1000] ^= 4
    await any_site.account.write(changeset.container, name, bytes(segment))
    async with any_site.applier(source) as service:
        watermark = await any_site.until(source, lambda found: bool(found.wanted))
        assert watermark.wanted == (name,)
        assert watermark.applied == Stamp(0, 0)
        await until(lambda: "waiting for 1 blobs" in str(service.health.warnings))
        assert name in any_site.events(source)
        await any_site.account.write(changeset.container, name, changeset.segments[1])
        watermark = await any_site.until_applied(source, Stamp(1, 1))
        assert watermark.wanted == ()
        await until(lambda: service.health.state == "normal")
    any_site.check(source, changeset)


async def test_flipped_manifest_is_refused_asked_for_and_applied_when_put_again(
    any_site: Site,
) -> None:
    source = a_source()
    changeset = source.changeset()
    await changeset.put(any_site.account)
    sealed = bytearray(changeset.sealed)
    sealed[-20] ^= 1
    await any_site.account.write(changeset.container, changeset.manifest_name, bytes(sealed))
    async with any_site.applier(source):
        watermark = await any_site.until(source, lambda found: bool(found.wanted))
        assert watermark.wanted == (changeset.manifest_name,)
        assert "altered" in any_site.events(source)
        await any_site.account.write(changeset.container, changeset.manifest_name, changeset.sealed)
        await any_site.until_applied(source, Stamp(1, 1))
    any_site.check(source, changeset)


async def test_all_missing_segments_are_asked_for_at_once(any_site: Site) -> None:
    source = a_source()
    changeset = source.changeset()
    lost = (changeset.segment_name(0), changeset.segment_name(2))
    await changeset.put(any_site.account, without=lost)
    async with any_site.applier(source):
        watermark = await any_site.until(source, lambda found: bool(found.wanted))
        assert watermark.wanted == lost
        await changeset.put(any_site.account)
        await any_site.until_applied(source, Stamp(1, 1))
    any_site.check(source, changeset)


async def test_manifest_of_another_changeset_in_its_place_is_refused(site: Site) -> None:
    source = a_source()
    first = source.changeset()
    source.scribble()
    second = source.changeset()
    await first.put(site.account)
    async with site.applier(source):
        await site.until_applied(source, Stamp(1, 1))
        await site.account.write(second.container, second.manifest_name, first.sealed)
        watermark = await site.until(source, lambda found: bool(found.wanted))
        assert watermark.wanted == (second.manifest_name,)
        await second.put(site.account)
        await site.until_applied(source, Stamp(1, 2))
    site.check(source, first, second)


async def test_gap_is_asked_for_and_closed(any_site: Site) -> None:
    source = a_source()
    changesets = [source.changeset()]
    for _ in range(4):
        source.scribble()
        changesets.append(source.changeset())
    for changeset in (changesets[0], changesets[4], changesets[3]):
        await changeset.put(any_site.account)
    async with any_site.applier(source) as service:
        watermark = await any_site.until(source, lambda found: bool(found.wanted))
        assert watermark.applied == Stamp(1, 1)
        await until(lambda: lag(service) == 4)
        assert watermark.wanted == (changesets[1].manifest_name, changesets[2].manifest_name)
        for changeset in (changesets[2], changesets[1]):
            await changeset.put(any_site.account)
        watermark = await any_site.until_applied(source, Stamp(1, 5))
        assert watermark.wanted == ()
        await until(lambda: lag(service) == 0)
    any_site.check(source, *changesets)


async def test_gap_that_stays_is_lost_until_it_is_closed_after_all(site: Site) -> None:
    source = a_source()
    first = source.changeset()
    source.scribble()
    second = source.changeset()
    await second.put(site.account)
    async with site.applier(source, gap_seconds_max=0.5) as service:
        watermark = await site.until(source, lambda found: bool(found.lost))
        assert first.manifest_name in watermark.lost
        await until(lambda: service.health.state == "critical")
        await first.put(site.account)
        watermark = await site.until_applied(source, Stamp(1, 2))
        assert watermark.lost == ""
        await until(lambda: service.health.state == "normal")
    site.check(source, first, second)


async def test_superset_bridges_changesets_that_are_gone(site: Site) -> None:
    source = a_source()
    first = source.changeset()
    for _ in range(3):
        source.scribble()
        source.changeset()
    source.scribble()
    bridge = source.changeset(since=1)
    await first.put(site.account)
    await bridge.put(site.account)
    async with site.applier(source):
        await site.until_applied(source, Stamp(1, 5))
    site.check(source, first, bridge)
    assert site.stamps(source) == [Stamp(1, 1), Stamp(1, 5)]


async def test_superset_applies_over_what_it_repeats(site: Site) -> None:
    source = a_source()
    changesets = [source.changeset()]
    async with site.applier(source):
        for since in (None, None, 1, 0):
            source.scribble()
            changesets.append(source.changeset(since=since))
            await asyncio.gather(*(changeset.put(site.account) for changeset in changesets))
        await site.until_applied(source, Stamp(1, 5))
    site.check(source, *changesets)


async def test_abandoned_attempt_and_second_attempt_change_nothing(site: Site) -> None:
    source = a_source()
    first = source.changeset()
    source.scribble()
    abandoned = source.changeset()
    committed = source.again(abandoned)
    await first.put(site.account)
    await abandoned.put(site.account, without=[abandoned.manifest_name])
    async with site.applier(source):
        await site.until_applied(source, Stamp(1, 1))
        await committed.put(site.account)
        watermark = await site.until_applied(source, Stamp(1, 2))
        assert watermark.attempt == committed.manifest.attempt
        await source.again(committed).put(site.account)
        source.scribble()
        third = source.changeset()
        await third.put(site.account)
        await site.until_applied(source, Stamp(1, 3))
    site.check(source, first, committed, third)


async def test_applied_changesets_are_not_applied_again_after_a_restart(site: Site) -> None:
    source = a_source()
    changesets = [source.changeset()]
    await changesets[0].put(site.account)
    async with site.applier(source):
        await site.until_applied(source, Stamp(1, 1))
    source.scribble()
    changesets.append(source.changeset())
    await changesets[1].put(site.account)
    async with site.applier(source):
        await site.until_applied(source, Stamp(1, 2))
    site.check(source, *changesets)
    assert site.stamps(source) == [Stamp(1, 1), Stamp(1, 2)]


async def test_inconsistent_changeset_is_applied_and_is_no_recovery_point(site: Site) -> None:
    source = a_source()
    first = source.changeset(consistency=Consistency.NONE, initial=True)
    await first.put(site.account)
    async with site.applier(source):
        watermark = await site.until_applied(source, Stamp(1, 1))
        assert watermark.restorable_ns == 0
        source.scribble()
        second = source.changeset(consistency=Consistency.APP)
        await second.put(site.account)
        watermark = await site.until(source, lambda found: found.restorable_ns > 0)
        assert watermark.restorable_ns == second.manifest.bookmark.time_ns
    site.check(source, second)


async def test_new_generation_with_resized_disks_takes_over(any_site: Site) -> None:
    source = a_source()
    first = source.changeset()
    source.scribble()
    lost = source.changeset()
    source.scribble()
    waiting = source.changeset()
    await first.put(any_site.account)
    await waiting.put(any_site.account)
    async with any_site.applier(source):
        await any_site.until(source, lambda found: bool(found.wanted))
        source.disks[0] += source.random.randbytes(1 << 20)
        del source.disks[1][300 << 10 :]
        source.new_generation()
        renewed = source.changeset()
        await renewed.put(any_site.account)
        watermark = await any_site.until_applied(source, Stamp(2, 1))
        assert watermark.wanted == ()
        await lost.put(any_site.account)  # too late: its generation is over
        source.scribble()
        after = source.changeset()
        await after.put(any_site.account)
        await any_site.until_applied(source, Stamp(2, 2))
    any_site.check(source, first, renewed, after)
    assert any_site.stamps(source) == [Stamp(1, 1), Stamp(2, 1), Stamp(2, 2)]


async def test_frame_behind_the_end_of_its_disk_is_never_applied(site: Site) -> None:
    source = a_source()
    await source.changeset(astray=True).put(site.account)
    async with site.applier(source) as service:
        watermark = await site.until(source, lambda found: bool(found.lost))
        assert "cannot be applied" in watermark.lost
        assert watermark.applied == Stamp(0, 0)
        await until(lambda: service.health.state == "critical")
        source.new_generation()
        renewed = source.changeset()
        await renewed.put(site.account)
        watermark = await site.until_applied(source, Stamp(2, 1))
        assert watermark.lost == ""
    site.check(source, renewed)


async def test_wrong_data_key_applies_nothing_and_says_so(site: Site) -> None:
    source = a_source()
    await source.changeset().put(site.account)
    source.data_key = bytes(32)
    async with site.applier(source) as service:
        watermark = await site.until(source, lambda found: bool(found.wanted))
        assert watermark.applied == Stamp(0, 0)
        await until(lambda: "data key" in str(service.health.warnings))


async def test_passed_containers_are_dropped_and_the_current_one_stays(any_site: Site) -> None:
    source = a_source()
    first = source.changeset()
    source.number = 64
    source.scribble()
    later = source.changeset(since=1)
    assert first.container != later.container
    await first.put(any_site.account)
    await later.put(any_site.account)
    async with any_site.applier(source):
        await any_site.until_applied(source, Stamp(1, 65))
        prefix = first.container[:32]
        for _ in range(200):
            if (left := await any_site.account.containers(prefix)) == [later.container]:
                break
            await asyncio.sleep(0.05)
        assert left == [later.container]
    any_site.check(source, first, later)


def lag(service: Service) -> float | None:
    labels = {"machine": "web"}
    return service.registry.get_sample_value("understudy_applier_lag_changesets", labels)


async def test_changeset_whose_segments_are_lost_everywhere_is_passed_over(any_site: Site) -> None:
    source = a_source()
    async with any_site.applier(source):
        changesets = [source.changeset()]
        await changesets[0].put(any_site.account)
        await any_site.until_applied(source, Stamp(1, 1))
        source.scribble()
        lost = source.changeset()
        await lost.put(any_site.account, without=[lost.segment_name(0)])
        wanted = await any_site.until(source, lambda found: bool(found.wanted))
        assert wanted.wanted == (lost.segment_name(0),)
        # Its source sends all that changed since, under a new number.
        source.scribble()
        again = source.changeset(since=1)
        await again.put(any_site.account)
        watermark = await any_site.until_applied(source, Stamp(1, 3))
        await any_site.until(source, lambda found: not found.wanted)
        assert watermark.lost == ""
    assert any_site.stamps(source) == [Stamp(1, 1), Stamp(1, 3)]
    any_site.check(source, again)


@pytest.mark.parametrize("key", ["disk_bytes_max", "machine_space_bytes_max"])
async def test_machine_that_is_too_large_waits_and_is_told(site: Site, key: str) -> None:
    source = a_source(2 << 20)
    first = source.changeset()
    await first.put(site.account)
    second = None
    async with site.applier(source, **{key: 1 << 20}) as service:
        if key == "machine_space_bytes_max":  # looked at before a changeset is applied
            await site.until_applied(source, Stamp(1, 1))
            source.touch(0, range(10))
            second = source.changeset()
            await second.put(site.account)
        await until(lambda: key in str(service.health.criticals))
        newest = Stamp(1, 1) if second else Stamp(0, 0)
        assert (await site.watermark(source)).applied == newest
        assert (await site.watermark(source)).lost == ""
    async with site.applier(source) as service:
        await site.until_applied(source, (second or first).stamp)
        await until(lambda: service.health.state == "normal")
    site.check(source, second or first)
