import asyncio

import pytest

from appliance.applier.fetch import ByteWindow


async def test_window_never_holds_more_than_it_may() -> None:
    window = ByteWindow(100, 4)
    held = most = count = 0

    async def visit(size: int) -> None:
        nonlocal held, most, count
        await window.enter(size)
        held += size
        count += 1
        most = max(most, held)
        assert count <= 4
        await asyncio.sleep(0.001)
        held -= size
        count -= 1
        window.leave(size)

    await asyncio.gather(*(visit(size % 97 + 1) for size in range(0, 3000, 37)))
    assert 50 < most <= 100


async def test_large_segment_is_not_overtaken_for_ever() -> None:
    window = ByteWindow(100, 10)
    await window.enter(60)
    large = asyncio.create_task(window.enter(90))
    await asyncio.sleep(0)
    small = asyncio.create_task(window.enter(10))
    await asyncio.sleep(0)
    assert not large.done()
    assert not small.done()
    window.leave(60)
    await large
    await small


@pytest.mark.parametrize("when", ["waiting", "admitted"])
async def test_cancelled_entry_gives_its_room_back(when: str) -> None:
    window = ByteWindow(100, 10)
    await window.enter(100)
    waiting = asyncio.create_task(window.enter(100))
    await asyncio.sleep(0)
    if when == "admitted":
        window.leave(100)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    if when == "waiting":
        window.leave(100)
    await asyncio.wait_for(window.enter(100), 5)
