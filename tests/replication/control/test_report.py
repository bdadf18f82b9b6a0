import uuid

import pytest
from pydantic import TypeAdapter, ValidationError

from replication.control.report import (
    DEVICES_MAX,
    ApplierReport,
    BlockDevice,
    MachineReport,
    Phase,
    ProcessServerReport,
    Report,
    StoreReport,
    StreamReport,
)

ADAPTER: TypeAdapter[Report] = TypeAdapter(Report)
REPORTS = (
    MachineReport(time_ns=1, phase=Phase.REPLICATING),
    ProcessServerReport(time_ns=1, streams=(StreamReport(machine=uuid.UUID(int=1)),)),
    ApplierReport(time_ns=1, stores=(StoreReport(machine=uuid.UUID(int=1), removed=True),)),
)


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.kind)
def test_a_report_is_read_as_its_kind(report: Report) -> None:
    assert ADAPTER.validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("document", ["{}", '{"kind": "toaster", "time_ns": 1}', "[]", "null"])
def test_what_is_of_no_kind_is_refused(document: str) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_json(document)


def test_numbers_are_not_negative_and_texts_are_bounded() -> None:
    device = {"id": "sda", "device": "/dev/sda", "size_bytes": 1}
    refused: tuple[dict[str, object], ...] = (
        {"time_ns": -1},
        {"hostname": "x" * 2001},
        {"devices": [device] * (DEVICES_MAX + 1)},
    )
    for wrong in refused:
        with pytest.raises(ValidationError):
            MachineReport.model_validate({"time_ns": 1, **wrong})
    with pytest.raises(ValidationError):
        BlockDevice(id="sda", device="/dev/sda", size_bytes=-1)
