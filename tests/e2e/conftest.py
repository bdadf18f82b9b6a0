"""A rig per test, taken down whatever happens; a failed test tells what its parts said."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.e2e.part import Part
from tests.e2e.rig import Rig

Part.is_forked = True  # hundreds of starts
_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.fixture
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(tmp_path)
    try:
        yield made
        if request.node.stash.get(_FAILED, False):
            print(made.report())  # noqa: T201 - pytest shows it with the failure
        else:
            made.assert_stops_cleanly()
    finally:
        made.clean_up()
