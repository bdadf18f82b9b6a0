"""Why a plan cannot run: each reason, alone."""

from typing import Any

import pytest

from appliance.config_server.recovery.plans.plan import Plan
from appliance.config_server.recovery.plans.validation import MachineFacts, facts_of, validate
from appliance.config_server.recovery.plans.yaml_text import parse_plan
from appliance.config_server.recovery.run import FailoverKind
from tests.appliance.config_server.recovery.plans.shop import (
    HOUR_NS,
    NOW_NS,
    SHOP,
    document,
    machine,
)


def found(
    machines: tuple[MachineFacts, ...], tree: dict[str, Any] | None = None, **options: Any
) -> list[tuple[str, str, bool]]:
    problems = validate(Plan.of(document(tree)), facts_of(machines), **options)
    assert all(problem.message for problem in problems)
    return [(each.code, each.where, each.fatal) for each in problems]


DB, WEB = machine("db-1"), machine("web-1")


def test_a_good_plan_has_no_problems() -> None:
    assert found((DB, WEB)) == []
    assert found((DB, WEB), kind=FailoverKind.PLANNED, choice="latest-app-consistent") == []


@pytest.mark.parametrize(
    ("web", "expected"),
    [
        ({"protected": False}, ("unprotected", "groups.1.machines.0", True)),
        ({"newest_ns": 0, "newest_app_ns": 0}, ("no_point", "groups.1.machines.0", True)),
        ({"points_known": False, "newest_ns": 0}, ("points_unknown", "groups.1.machines.0", False)),
        ({"newest_app_ns": 0}, ("no_common_consistency", "groups", False)),
        ({"newest_ns": NOW_NS - HOUR_NS}, ("far_apart", "groups", False)),
        ({"other_plans": ("big",)}, ("in_other_plan", "groups.1.machines.0", False)),
    ],
)  # fmt: skip
def test_each_machine_has_to_be_recoverable(
    web: dict[str, Any], expected: tuple[str, str, bool]
) -> None:
    assert found((DB, machine("web-1", **web))) == [expected]


def test_an_unknown_machine_is_named() -> None:
    assert found((DB,)) == [("unknown_machine", "groups.1.machines.0", True)]


def test_app_consistent_points_are_needed_where_they_are_chosen() -> None:
    machines = (DB, machine("web-1", newest_app_ns=0))
    assert found(machines, choice="latest-app-consistent") == [
        ("no_common_consistency", "groups", True)
    ]


def test_a_busy_machine_can_be_tested_and_not_failed_over() -> None:
    machines = (DB, machine("web-1", busy="it is failed over already"))
    assert found(machines) == []
    assert found(machines, kind=FailoverKind.UNPLANNED) == [("busy", "groups.1.machines.0", True)]


def test_a_machine_is_the_same_by_name_and_by_id() -> None:
    groups = [{"name": "one", "machines": [{"machine": "db-1"}, {"machine": str(DB.id).upper()}]}]
    assert found((DB,), {"groups": groups}) == [("machine_twice", "groups.0.machines.1", True)]
    groups = [{"name": "one", "machines": [{"machine": "db-1"}, {"machine": "db-1"}]}]
    assert found((DB,), {"groups": groups}) == [("machine_twice", "groups.0.machines.1", True)]


def test_a_plan_of_actions_alone_recovers_nothing() -> None:
    actions = [{"name": "x", "manual": {"instruction": "y"}}]
    groups: list[dict[str, Any]] = [{"name": "one", "before": actions}]
    assert found((DB,), {"groups": groups}) == [("no_machine", "groups", True)]
    groups.append({"name": "two", "machines": [{"machine": "db-1"}]})
    assert found((DB,), {"groups": groups}) == []


def test_actions_that_are_refused_are_told_by_name() -> None:
    plan = Plan.of(parse_plan(SHOP))
    machines = tuple(machine(name) for name in ("db-1", "web-1", "web-2"))
    where = plan.groups[0].acts[0].where
    (problem,) = validate(plan, facts_of(machines, {where: "it is not there"}))
    assert problem.fatal
    assert problem.message == "stop the queue: it is not there"
    assert [act.keys for act in plan.groups[1].acts] == [("dns.key", "known_hosts"), ()]
