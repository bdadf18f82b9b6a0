import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from replication.control.assignment import ApplierAssignment, ComputeAssignment
from replication.control.recovery import (
    EVIDENCE_BYTES_MAX,
    Evidence,
    HeldPoint,
    Hold,
    PointChoice,
    SourceDisk,
    VirtualMachineOrder,
    VmCheck,
    VmPower,
    VmReport,
    VmState,
)
from replication.control.report import REPORT_BYTES_MAX, ComputeReport, read_report
from replication.errors import PeerError

MACHINE, ID = uuid.UUID(int=1), uuid.UUID(int=2)


@given(st.binary(max_size=2000))
def test_evidence_comes_out_as_it_went_in(content: bytes) -> None:
    assert Evidence.model_validate_json(Evidence.of(content).model_dump_json()).bytes() == content


def test_the_largest_evidence_fits_a_request_and_a_larger_one_is_refused() -> None:
    whole = Evidence.of(bytes(EVIDENCE_BYTES_MAX))
    assert len(whole.model_dump_json()) < REPORT_BYTES_MAX
    with pytest.raises(ValidationError):
        Evidence(content=whole.content + "AAAAAAAA")
    with pytest.raises(PeerError, match="base64"):
        Evidence(content="*").bytes()


def test_an_order_survives_the_wire() -> None:
    order = VirtualMachineOrder(
        id=ID,
        name="db-01-test",
        machine=MACHINE,
        disks=(SourceDisk(index=0, name="data", size_bytes=4096, source="db-01/p/disk0.img"),),
        network="test-1",
        power=VmPower.ON,
    )
    assignment = ComputeAssignment(version=3, vms=(order,), removed=(MACHINE,))
    assert ComputeAssignment.model_validate_json(assignment.model_dump_json()) == assignment
    hold = Hold(id=ID, machine=MACHINE, choice=PointChoice.LATEST, generation=1, number=7)
    told = ApplierAssignment(version=4, holds=(hold,))
    assert ApplierAssignment.model_validate_json(told.model_dump_json()) == told


def test_a_compute_node_reports() -> None:
    vm = VmReport(id=ID, state=VmState.UP, check=VmCheck(passed=True, detail="login prompt"))
    report = ComputeReport(time_ns=1, vms=(vm,), removed=(MACHINE,))
    assert read_report(report.model_dump(mode="json")) == report
    held = HeldPoint(id=ID, machine=MACHINE, state="held", point="p", position=4)
    assert HeldPoint.model_validate_json(held.model_dump_json()) == held


@pytest.mark.parametrize("field", [{"cpu_count": 0}, {"memory_bytes": 1}, {"script": "a\0"}])
def test_senseless_orders_are_refused(field: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        VirtualMachineOrder.model_validate(
            {"id": ID, "name": "a", "machine": MACHINE, "disks": (), "network": "n", **field}
        )


def test_what_becomes_a_path_or_an_address_is_nothing_else() -> None:
    for address in ("", "10.0.0.2", "fe80::1"):
        assert VmReport(id=ID, state=VmState.UP, address=address).address == address
    with pytest.raises(ValidationError, match="address"):
        VmReport(id=ID, state=VmState.UP, address="10.0.0.2; reboot")
    for broken in ({"point": "a\nb"}, {"folder": "a\x7fb"}):
        with pytest.raises(ValidationError):
            HeldPoint.model_validate({"id": ID, "machine": MACHINE, "state": "held", **broken})
