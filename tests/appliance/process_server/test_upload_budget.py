import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.process_server.upload_budget import UploadBudget


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 150), max_size=20), st.integers(1, 4))
def test_uploads_stay_within_the_budget_and_in_order(sizes: list[int], count_max: int) -> None:
    budget = UploadBudget(count_max, 100)
    under_way: list[int] = []
    order: list[int] = []

    async def upload(index: int) -> None:
        async with budget.place(sizes[index]):
            order.append(index)
            under_way.append(sizes[index])
            assert len(under_way) <= count_max
            assert sum(under_way) <= 100 or len(under_way) == 1
            await asyncio.sleep(0)
            under_way.remove(sizes[index])

    async def upload_all() -> None:
        async with asyncio.timeout(10.0), asyncio.TaskGroup() as tasks:
            for index in range(len(sizes)):
                tasks.create_task(upload(index))

    asyncio.run(upload_all())
    assert order == list(range(len(sizes)))
