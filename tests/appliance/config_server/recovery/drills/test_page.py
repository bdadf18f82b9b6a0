"""The page of a report: whole, escaped, and nothing loaded."""

import re
from html.parser import HTMLParser

import pytest

from appliance.config_server.recovery.drills.page import image, render, share, size, span
from appliance.config_server.recovery.drills.report import sealed
from tests.appliance.config_server.recovery.drills.evidence import drill, machine, png

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'


class Elements(HTMLParser):
    """All elements with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_page_tells_everything() -> None:
    tree = sealed(drill())
    page = render(tree)
    for told in (
        "Disaster recovery drill: shop", "✓ Passed", "24.7 s", "3 of 3", "42.0 s", "db-1",
        "20261128T120000Z-000123", "app-consistent", "its own system", "the recovery guest",
        "stop the queue", "attempt 2", "ann: rows counted", "accepting connections",
        "make the disks", "5 disks", "remove the VMs", "Quarterly evidence", tree["digest"],
    ):  # fmt: skip
        assert told in page
    assert page.count("data:image/png;base64,") == 3


def test_a_drill_that_failed_says_why() -> None:
    page = render(
        sealed(
            drill(
                passed=False,
                reason="web-1: its check did not pass",
                machines=[machine("web-1", 1, 0, passed=False, rto_seconds=None, error="no root")],
                cleanup={"state": "failed", "error": "the compute node is silent"},
            )
        )
    )
    for told in ("✗ Failed", "its check did not pass", "0 of 1", "no root", "Not clean", "silent"):
        assert told in page


def test_a_drill_that_could_not_begin_has_a_page() -> None:
    page = render(sealed(drill(passed=False, machines=[], actions=[], steps=[], cleanup=None)))
    assert "0 of 0" in page


def test_nothing_in_it_runs_or_is_loaded() -> None:
    hostile = machine(
        HOSTILE, 1, 1.0, point=HOSTILE, console=HOSTILE, error=HOSTILE, screenshot=HOSTILE
    )
    action = {"group": 1, "place": "after", "name": HOSTILE, "kind": HOSTILE, "state": HOSTILE}
    page = render(sealed(drill(target=HOSTILE, machines=[hostile], actions=[action])))
    elements = Elements(page).found
    assert "49" not in re.findall(r"\d+", page.replace(drill().id, ""))[:40]
    assert {tag for tag, _ in elements}.isdisjoint({"script", "link", "iframe", "object", "a"})
    for tag, attributes in elements:
        assert not any(name.startswith("on") for name in attributes), tag
        assert (attributes.get("src") or "data:").startswith("data:")
        assert "href" not in attributes
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (None, "\N{EN DASH}"),
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (125, "2 min 5 s"),
        (3720, "1 h 2 min"),
    ],
)
def test_spans_are_for_people(seconds: float | None, told: str) -> None:
    assert span(seconds) == told


def test_sizes_bars_and_pictures() -> None:
    assert [size(each) for each in (0, 2048, 1 << 31, 1 << 41)] == [
        "0 B", "2.0 KiB", "2.0 GiB", "2.0 TiB",
    ]  # fmt: skip
    assert [share(part, 10.0) for part in (None, 0.01, 5.0, 20.0)] == [0, 1, 50, 100]
    assert share(1.0, 0.0) == 0
    assert image(png()).startswith("data:image/png;base64,iVBOR")
    assert image("PHN2Zz4=") == ""
    assert image("") == ""
