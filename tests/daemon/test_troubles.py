from daemon.service import Health
from daemon.troubles import TEXT_CHARS_MAX, clipped, troubles_of
from replication.control.report import MachineReport, read_report


def test_whatever_a_part_says_fits_into_a_report() -> None:
    health = Health()
    health.report("script\0", critical="it said \0 and \udcff" + "x" * TEXT_CHARS_MAX)
    report = MachineReport(time_ns=1, troubles=troubles_of(health))
    assert read_report(report.model_dump(mode="json")) == report
    (trouble,) = report.troubles
    assert (trouble.part, trouble.reason[:21]) == ("script\\0", "it said \\0 and \\udcff")
    assert len(trouble.reason) == TEXT_CHARS_MAX


def test_what_fits_is_left_as_it_is() -> None:
    assert clipped("grüß\n" * 3) == "grüß\n" * 3
