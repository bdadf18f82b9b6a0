"""Reports of many VMs in one document that may not be larger than a report is.

The states always fit: first goes what scripts wrote, then what was found of each file system.
"""

from collections.abc import Sequence

from replication.control.recovery import VmReport
from replication.control.report import REPORT_BYTES_MAX

VMS_BYTES_MAX = REPORT_BYTES_MAX - (192 << 10)
"""The rest is for the node itself and its troubles."""

SHORT_CHARACTERS = 100


def fitting(reports: Sequence[VmReport], bytes_max: int = VMS_BYTES_MAX) -> tuple[VmReport, ...]:
    """The reports, shortened as little as is needed, the largest first."""
    sized = [(len(report.model_dump_json()), report) for report in reports]
    for shorten in (_without_output, _without_file_systems, _short):
        total = sum(size for size, _ in sized)
        for index in sorted(range(len(sized)), key=lambda at: -sized[at][0]):
            if total <= bytes_max:
                break
            size, report = sized[index]
            report = shorten(report)
            sized[index] = (len(report.model_dump_json()), report)
            total += sized[index][0] - size
    return tuple(report for _, report in sized)


def _changed(report: VmReport, **changed: object) -> VmReport:
    if report.check is None:
        return report
    return report.model_copy(update={"check": report.check.model_copy(update=changed)})


def _without_output(report: VmReport) -> VmReport:
    return _changed(report, output="")


def _without_file_systems(report: VmReport) -> VmReport:
    return _changed(report, file_systems=())


def _short(report: VmReport) -> VmReport:
    detail = report.check.detail[:SHORT_CHARACTERS] if report.check else ""
    shorter = _changed(report, detail=detail)
    return shorter.model_copy(update={"reason": report.reason[:SHORT_CHARACTERS]})
