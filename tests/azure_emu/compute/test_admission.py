import asyncio
import uuid

import pytest

from azure_emu.compute.admission import Admission
from replication.errors import InputError

GIB = 1 << 30


def ids(count: int) -> list[uuid.UUID]:
    return [uuid.uuid4() for _ in range(count)]


async def settled(*tasks: "asyncio.Task[None]") -> list[bool]:
    for _ in range(3):
        await asyncio.sleep(0)
    return [task.done() for task in tasks]


async def test_boots_are_let_in_one_after_the_other_in_order() -> None:
    admission, vms = Admission(100 * GIB, 1), ids(3)
    tasks = [asyncio.create_task(admission.admit(vm, GIB)) for vm in vms]
    assert await settled(*tasks) == [True, False, False]
    admission.count(vms[0], GIB, booting=True)
    assert await settled(*tasks) == [True, False, False]
    admission.count(vms[0], GIB, booting=False)
    admission.count(vms[0], GIB, booting=False)
    assert await settled(*tasks) == [True, True, False]
    admission.release(vms[1])
    assert await settled(*tasks) == [True, True, True]


async def test_memory_is_never_given_twice() -> None:
    admission, vms = Admission(2 * GIB, 9), ids(3)
    tasks = [asyncio.create_task(admission.admit(vm, GIB)) for vm in vms]
    assert await settled(*tasks) == [True, True, False]
    admission.count(vms[0], GIB, booting=False)
    assert await settled(*tasks) == [True, True, False]
    admission.release(vms[0])
    assert await settled(*tasks) == [True, True, True]


async def test_who_waits_no_more_is_in_nobodys_way() -> None:
    admission, vms = Admission(100 * GIB, 1), ids(3)
    tasks = [asyncio.create_task(admission.admit(vm, GIB)) for vm in vms]
    await settled(*tasks)
    tasks[1].cancel()
    admission.release(vms[0])
    assert await settled(*tasks) == [True, True, True]
    assert tasks[1].cancelled()


async def test_more_than_there_is_fails_at_once() -> None:
    with pytest.raises(InputError, match="2048 MiB, all VMs together may have 1024") as raised:
        await Admission(GIB, 1).admit(uuid.uuid4(), 2 * GIB)
    assert raised.value.hint


async def test_what_runs_already_counts() -> None:
    admission, vms = Admission(2 * GIB, 1), ids(2)
    admission.count(vms[0], 2 * GIB, booting=True)
    task = asyncio.create_task(admission.admit(vms[1], GIB))
    assert await settled(task) == [False]
    admission.release(vms[0])
    assert await settled(task) == [True]
