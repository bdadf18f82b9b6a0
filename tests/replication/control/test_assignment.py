import uuid

import pytest
from pydantic import ValidationError

from replication.bookmark import DiskShape
from replication.control.assignment import (
    MACHINE_COUNT_MAX,
    ApplierAssignment,
    AssignedDisk,
    ComputeAssignment,
    MachineAssignment,
    NodeAssignment,
    ProcessServerAssignment,
)
from replication.control.role import NodeRole

MACHINE = uuid.UUID(int=7)


def test_each_role_has_one_assignment() -> None:
    kinds = (
        MachineAssignment,
        ProcessServerAssignment,
        ApplierAssignment,
        ComputeAssignment,
    )
    assert [kind.role for kind in kinds] == [*NodeRole]
    assert all(issubclass(kind, NodeAssignment) for kind in kinds)


def test_an_assignment_that_leaves_out_whether_it_protects_is_refused() -> None:
    """Else half an answer would end a protection."""
    with pytest.raises(ValidationError, match="protected"):
        MachineAssignment.model_validate({"version": 1, "machine": str(MACHINE), "name": "web"})


def test_an_empty_assignment_of_an_applier_removes_nothing() -> None:
    assert ApplierAssignment(version=1).removed == ()


def test_lists_are_bounded() -> None:
    many = [str(uuid.UUID(int=number)) for number in range(MACHINE_COUNT_MAX + 1)]
    with pytest.raises(ValidationError, match="at most"):
        ProcessServerAssignment.model_validate({"version": 1, "machines": many})


def test_a_disk_is_in_the_stream_what_was_assigned() -> None:
    disk = AssignedDisk(index=2, device="/dev/sdb", name="data", size_bytes=4096)
    assert disk.shape() == DiskShape(2, "data", 4096)


def test_an_assignment_survives_the_wire() -> None:
    assignment = MachineAssignment(
        version=9,
        machine=MACHINE,
        name="web",
        protected=True,
        disks=(AssignedDisk(index=0, device="/dev/sda", name="sda", size_bytes=512),),
    )
    again = MachineAssignment.model_validate_json(assignment.model_dump_json())
    assert again == assignment
    assert "role" not in assignment.model_dump()
