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
    read_report,
)
from replication.control.value import COUNT_MAX

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
        {"time_ns": COUNT_MAX + 1},
        {"time_ns": 10**400},
        {"skew_ns": COUNT_MAX + 1},
        {"skew_ns": -COUNT_MAX - 1},
        {"reason": "a\0b"},
        {"reason": "\ud800"},
        {"software": "\0"},
        {"load": {"cpu_share": float("nan")}},
        {"load": {"cpu_share": -0.1}},
    )
    for wrong in refused:
        with pytest.raises(ValidationError):
            MachineReport.model_validate({"time_ns": 1, **wrong})
    with pytest.raises(ValidationError):
        BlockDevice(id="sda", device="/dev/sda", size_bytes=-1)
    with pytest.raises(ValidationError):
        BlockDevice(id="sda", device="/dev/sda", size_bytes=2**70)
    for seconds in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ValidationError):
            StreamReport(machine=uuid.UUID(int=1), backlog_seconds=seconds)


def test_the_largest_numbers_are_taken() -> None:
    report = MachineReport(time_ns=COUNT_MAX, skew_ns=-COUNT_MAX, sent_bytes=COUNT_MAX)
    assert read_report(report.model_dump(mode="json")) == report


@pytest.mark.parametrize("document", [None, {}, [], "x", {"kind": "machine", "time_ns": 10**400}])
def test_what_is_stored_and_is_no_report_is_none(document: object) -> None:
    assert read_report(document) is None
