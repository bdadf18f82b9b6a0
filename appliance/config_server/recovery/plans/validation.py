"""Whether a plan can run, and if not, why: a pure function over what is known of its machines.

Source: docs/RECOVERY.md §5.
"""

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from appliance.config_server.recovery.plans.plan import Act, Member, Plan, Problem, shape_problems
from appliance.config_server.recovery.run import FailoverKind
from replication.control.recovery import PointChoice

FAR_APART_NS = 15 * 60 * 10**9
"""Newest points of a plan's machines further apart than this are told of."""

NAMES_TOLD_MAX = 5


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What is known of a machine.

    protected:     it is replicated, or was and can be recovered still.
    newest_ns:     time of its newest point; 0: it has none. newest_app_ns: the app-consistent one.
    points_known:  its applier has told of its points at all.
    busy:          why it cannot be failed over now (a failover that is open); empty: it can.
    other_plans:   plans that it is in as well.
    """

    id: uuid.UUID
    name: str
    state: str
    protected: bool
    newest_ns: int = 0
    newest_app_ns: int = 0
    points_known: bool = True
    busy: str = ""
    other_plans: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """What a plan is held against.

    machines: by what people call them: names, and ids as text.
    refused:  actions that this config server would not run, by their place, and why.
    """

    machines: Mapping[str, MachineFacts]
    refused: Mapping[str, str] = field(default_factory=dict)

    def find(self, reference: str) -> MachineFacts | None:
        """An id comes before a name."""
        return self.machines.get(reference.lower()) or self.machines.get(reference)


def facts_of(machines: tuple[MachineFacts, ...], refused: Mapping[str, str] | None = None) -> Facts:
    known = {one.name: one for one in machines} | {str(one.id): one for one in machines}
    return Facts(known, refused or {})


def validate(
    plan: Plan,
    facts: Facts,
    *,
    kind: FailoverKind = FailoverKind.TEST,
    choice: str = PointChoice.LATEST,
) -> tuple[Problem, ...]:
    """All that is wrong with the plan, what is fatal first."""
    found = [*shape_problems(plan), *_machine_problems(plan, facts, kind, choice)]
    found += [
        Problem("action_refused", act.where, f"{act.name}: {facts.refused[act.where]}")
        for act in _acts(plan)
        if act.where in facts.refused
    ]
    return tuple(sorted(found, key=lambda problem: not problem.fatal))


def _acts(plan: Plan) -> Iterator[Act]:
    return (act for group in plan.groups for act in group.acts)


def _machine_problems(
    plan: Plan, facts: Facts, kind: FailoverKind, choice: str
) -> Iterator[Problem]:
    seen: dict[uuid.UUID, Member] = {}
    good: list[MachineFacts] = []
    for member in plan.members:
        machine = facts.find(member.reference)
        if machine is None:
            yield Problem(
                "unknown_machine",
                member.where,
                f"there is no machine {member.reference}",
                "`understudy machines` lists them",
            )
            continue
        before = seen.setdefault(machine.id, member)
        if before is not member:
            if before.reference.lower() != member.reference.lower():  # else the shape says so
                yield Problem(
                    "machine_twice",
                    member.where,
                    f"{member.reference} and {before.reference} are the same machine",
                    "leave it in one group",
                )
            continue
        problem = _machine_problem(machine, member, kind)
        if problem is not None:
            yield problem
        else:
            good.append(machine)
        if machine.other_plans:
            yield Problem(
                "in_other_plan",
                member.where,
                f"{machine.name} is also in {_told(list(machine.other_plans))}",
                "do not run both at once",
                fatal=False,
            )
    yield from _consistency_problems(good, choice)


def _machine_problem(machine: MachineFacts, member: Member, kind: FailoverKind) -> Problem | None:
    if not machine.protected:
        return Problem(
            "unprotected",
            member.where,
            f"{machine.name} is {machine.state}: there is nothing to recover it from",
            f"`understudy protect {machine.name} --policy …`, or take it out of the plan",
        )
    if machine.busy and kind is not FailoverKind.TEST:
        return Problem(
            "busy",
            member.where,
            f"{machine.name}: {machine.busy}",
            "end that first: `understudy failover list`",
        )
    if not machine.points_known:
        return Problem(
            "points_unknown",
            member.where,
            f"the applier of {machine.name} has not told of its points yet",
            "see that the applier runs and reaches the config server",
            fatal=False,
        )
    if not machine.newest_ns:
        return Problem(
            "no_point",
            member.where,
            f"{machine.name} has no recovery point yet",
            "the first one exists when its initial replication is complete",
        )
    return None


def _consistency_problems(machines: list[MachineFacts], choice: str) -> Iterator[Problem]:
    known = [machine for machine in machines if machine.points_known]
    without = [machine.name for machine in known if not machine.newest_app_ns]
    if choice == PointChoice.LATEST_APP_CONSISTENT and without:
        yield Problem(
            "no_common_consistency",
            "groups",
            f"not all machines have an app-consistent point: {_told(without)} {_has(without)} none",
            "switch app-consistent points on in the policy, or choose latest-processed",
        )
    elif without and len(without) < len(known):
        yield Problem(
            "no_common_consistency",
            "groups",
            f"some machines have app-consistent points, {_told(without)} {_has(without)} none: "
            "together they can be recovered to crash-consistent points only",
            "give all of them policies with app-consistent points",
            fatal=False,
        )
    times = sorted((machine.newest_ns, machine.name) for machine in known)
    if times and times[-1][0] - times[0][0] > FAR_APART_NS:
        minutes = (times[-1][0] - times[0][0]) // (60 * 10**9)
        yield Problem(
            "far_apart",
            "groups",
            f"the newest points of {times[0][1]} and {times[-1][1]} are {minutes} minutes apart",
            f"see why {times[0][1]} lags: `understudy health {times[0][1]}`",
            fatal=False,
        )


def _told(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_TOLD_MAX} more" if len(names) > NAMES_TOLD_MAX else ""
    return ", ".join(names[:NAMES_TOLD_MAX]) + more


def _has(names: list[str]) -> str:
    return "has" if len(names) == 1 else "have"
