import time
import uuid

import pytest

from azure_emu.compute.reporting import VMS_BYTES_MAX, fitting
from replication.control.recovery import (
    VMS_MAX,
    CheckedFileSystem,
    VmCheck,
    VmReport,
    VmState,
)
from replication.control.report import REPORT_BYTES_MAX, ComputeReport


def report(text: str, file_systems: int = 1) -> VmReport:
    found = CheckedFileSystem(disk=0, device="/dev/vda", kind="ext4", clean=True, detail=text)
    check = VmCheck(
        passed=True, detail=text, output=text, script_exit=0, file_systems=(found,) * file_systems
    )
    return VmReport(id=uuid.uuid4(), state=VmState.UP, reason=text, check=check)


def test_what_fits_is_told_whole() -> None:
    reports = tuple(report("x" * 100) for _ in range(100))
    assert fitting(reports) == reports


def test_the_largest_loses_its_output_first() -> None:
    reports = (report("x"), report("y" * 2000))
    small, large = fitting(reports, len(reports[0].model_dump_json()) * 2 + 7000)
    assert small == reports[0]
    assert large.check is not None
    assert large.check.output == ""
    assert large.check.detail == "y" * 2000


@pytest.mark.parametrize("file_systems", [0, 1, 16])
def test_as_many_vms_as_there_may_be_fit(file_systems: int) -> None:
    reports = [report("ü" * 2000, file_systems) for _ in range(VMS_MAX)]
    found = fitting(reports)
    assert [one.id for one in found] == [one.id for one in reports]
    assert all(one.state is VmState.UP for one in found)
    assert all(one.check is not None and one.check.passed for one in found)
    whole = ComputeReport(time_ns=time.time_ns(), vms=found)
    assert len(whole.model_dump_json()) <= REPORT_BYTES_MAX
    assert sum(len(one.model_dump_json()) for one in found) <= VMS_BYTES_MAX
