"""A report's digest."""

import json
from typing import Any

import pytest

from appliance.config_server.recovery.drills.report import (
    DrillDocument,
    digest_of,
    is_untouched,
    sealed,
)
from tests.appliance.config_server.recovery.drills.evidence import drill


def test_a_report_is_what_its_digest_is_of() -> None:
    tree = sealed(drill())
    assert is_untouched(tree)
    assert is_untouched(json.loads(json.dumps(tree, indent=2)))
    assert sealed(DrillDocument.model_validate(tree)) == tree
    assert tree["digest"].startswith("sha256:")


@pytest.mark.parametrize(
    "change",
    [
        {"passed": False},
        {"rto_seconds": 1.0},
        {"machines": []},
        {"added": 1},
        {"digest": "sha256:" + 64 * "0"},
        {"digest": ""},
    ],
)
def test_a_change_shows(change: dict[str, Any]) -> None:
    assert not is_untouched({**sealed(drill()), **change})


def test_the_digest_is_of_one_form() -> None:
    assert digest_of({"b": 1, "a": "é", "digest": "x"}) == digest_of({"a": "é", "b": 1})
    # By the tool that whoever doubts has: printf '{"a":1}' | sha256sum
    assert digest_of({"a": 1}) == (
        "sha256:015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    )
