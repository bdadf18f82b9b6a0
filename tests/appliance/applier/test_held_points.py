import uuid
from pathlib import Path

from appliance.applier.held_points import HELD_BYTES_MAX, answer_on_disk, fitting, tell
from appliance.applier.holding import Answer, Holder, Wish
from appliance.applier.store.holds import NAME
from appliance.applier.store.reader_store import machine_folder
from replication.control.recovery import HeldPoint, Hold, PointChoice, PointDisk
from tests.appliance.applier.store.recorded_machine import MACHINE, RecordedMachine
from tests.appliance.applier.test_holding import CRASH, a_hold, a_point

WAITING = Answer.waits("for its store")


def test_a_held_point_is_told_with_all_that_a_virtual_machine_needs() -> None:
    hold = a_hold(PointChoice.LATEST)
    told = tell(hold, Answer("held", point=a_point(3, CRASH)))
    assert told == HeldPoint(
        id=hold.id,
        machine=MACHINE,
        state="held",
        folder=str(MACHINE),
        point="1970-01-01T00:00:03Z-00000003",
        position=3,
        generation=1,
        number=3,
        time_ns=3 * 10**9,
        consistency="crash",
        disks=(PointDisk(index=0, name="sda", size_bytes=4096),),
    )
    assert tell(hold, WAITING) == HeldPoint(
        id=hold.id, machine=MACHINE, state="waiting", reason="for its store"
    )
    assert len(tell(hold, Answer.refuses("x" * 5000)).reason) == 2000


def test_what_is_held_is_told_while_nobody_has_the_store_open(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path), sizes=(24,))
    held, other = a_hold(PointChoice.LATEST_PROCESSED), a_hold(PointChoice.LATEST)
    assert answer_on_disk(machine.root, held, WAITING) == WAITING
    with machine.open() as store:
        machine.apply(store)
        holder = Holder(store)
        holder.tend(Wish((held,)), 1)
        machine.apply(store)
    assert answer_on_disk(machine.root, held, WAITING) == holder.answers[held.id]
    assert answer_on_disk(machine.root, other, WAITING) == WAITING
    elsewhere = Hold(id=uuid.uuid4(), machine=uuid.uuid4(), choice="latest")
    assert answer_on_disk(machine.root, elsewhere, WAITING) == WAITING
    Path(machine_folder(machine.root, MACHINE), NAME).write_bytes(b"torn")
    assert "holds.json" in answer_on_disk(machine.root, held, WAITING).reason


def test_where_a_report_has_no_room_each_hold_is_in_every_few() -> None:
    few = [tell(a_hold(PointChoice.LATEST), WAITING) for _ in range(3)]
    assert fitting(few, 7) == tuple(few)
    assert fitting([], 1) == ()
    big = Answer.refuses("x" * 2000)
    many = [tell(a_hold(PointChoice.LATEST), big) for _ in range(1024)]
    seen = set()
    for nth in range(8):
        told = fitting(many, nth)
        assert sum(len(one.model_dump_json()) for one in told) <= HELD_BYTES_MAX
        seen |= {one.id for one in told}
    assert seen == {one.id for one in many}
