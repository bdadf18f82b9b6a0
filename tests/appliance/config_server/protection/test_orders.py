"""The numbers of orders, whatever agents say that they have carried out."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.nodes.report_book import Heard
from appliance.config_server.protection.machines import CARRIED_OUT_MAX, next_final, next_order
from appliance.config_server.store.schema import Machine
from replication.control.report import ApplierReport, MachineReport
from replication.control.value import COUNT_MAX

counts = st.integers(0, COUNT_MAX)


def machine(ordered: int) -> Machine:
    return Machine(resync_request=ordered, final_order=ordered)


def heard(carried_out: int) -> Heard:
    report = MachineReport(time_ns=1, resync_request=carried_out, final=carried_out)
    return Heard(time.time_ns(), report)


@pytest.mark.parametrize("following", [next_order, next_final])
@given(ordered=st.integers(0, CARRIED_OUT_MAX), carried_out=counts)
def test_an_order_is_new_and_leaves_room_for_many_more(
    following: type, ordered: int, carried_out: int
) -> None:
    found = following(machine(ordered), heard(carried_out))
    assert found > ordered
    assert found <= CARRIED_OUT_MAX + 1
    if carried_out <= CARRIED_OUT_MAX:
        assert found > carried_out
    again = following(machine(found), heard(COUNT_MAX))
    assert found < again <= COUNT_MAX - (1 << 31)


@pytest.mark.parametrize("following", [next_order, next_final])
def test_who_has_said_nothing_of_orders_is_counted_from_what_is_known(following: type) -> None:
    other = Heard(1, ApplierReport(time_ns=1))
    assert following(machine(6), None) == following(machine(6), other) == 7
