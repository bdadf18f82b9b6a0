"""A recovery plan inside: values that are frozen, and its shape's rules.

Source: docs/RECOVERY.md §5.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from appliance.config_server.recovery.plans.document import MACHINES_MAX, PlanDocument
from appliance.config_server.recovery.run import GROUPS_MAX, ActionKind, ActionPlace


@dataclass(frozen=True, slots=True)
class Member:
    """A machine of a plan, by the name or id that people wrote. ``where``: as in an error."""

    reference: str
    where: str


@dataclass(frozen=True, slots=True)
class Act:
    """An action of a plan, as far as it matters whether it can be done.

    is_local:  it runs on the config server's host. is_inline: it brings its own text.
    command:   what it runs there.
    keys:      files below the folder of keys that it needs.
    """

    name: str
    kind: ActionKind
    place: ActionPlace
    where: str
    is_local: bool = False
    is_inline: bool = False
    command: str = ""
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """A group; ``number`` counts from 1, as people count."""

    number: int
    name: str
    members: tuple[Member, ...]
    acts: tuple[Act, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan whose document has been read."""

    name: str
    groups: tuple[Group, ...]

    @property
    def members(self) -> Iterator[Member]:
        return (member for group in self.groups for member in group.members)

    @classmethod
    def of(cls, document: PlanDocument) -> "Plan":
        return cls(
            document.name,
            tuple(
                Group(
                    number=index + 1,
                    name=group.name,
                    members=tuple(
                        Member(one.machine, f"groups.{index}.machines.{place}")
                        for place, one in enumerate(group.machines)
                    ),
                    acts=tuple(_acts(document, index)),
                )
                for index, group in enumerate(document.groups)
            ),
        )


def _acts(document: PlanDocument, index: int) -> Iterator[Act]:
    group = document.groups[index]
    for place, actions in ((ActionPlace.BEFORE, group.before), (ActionPlace.AFTER, group.after)):
        for position, action in enumerate(actions):
            where = f"groups.{index}.{place}.{position}"
            script = action.script
            if script is None:
                yield Act(action.name, action.kind, place, where)
            elif script.where == "local":
                yield Act(
                    action.name,
                    action.kind,
                    place,
                    where,
                    is_local=True,
                    is_inline=script.inline is not None,
                    command=script.command or "",
                )
            else:
                keys = (script.where.key_file, script.where.known_hosts)
                yield Act(action.name, action.kind, place, where, keys=keys)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a plan.

    code:  for programs. where: the place in the document, empty for all of it.
    fatal: it cannot run so; else people should know of it.
    """

    code: str
    where: str
    message: str
    hint: str = ""
    fatal: bool = True


def shape_problems(plan: Plan) -> tuple[Problem, ...]:
    """What is wrong with a plan whatever machines there are."""
    return tuple(_shape_problems(plan))


def _shape_problems(plan: Plan) -> Iterator[Problem]:
    if len(plan.groups) > GROUPS_MAX:
        yield Problem(
            "too_many_groups",
            "groups",
            f"the plan has {len(plan.groups)} groups, at most {GROUPS_MAX} are allowed",
            "put machines that may start together into one group",
        )
    count = sum(1 for _ in plan.members)
    if count > MACHINES_MAX:
        yield Problem(
            "too_many_machines",
            "groups",
            f"the plan has {count} machines, at most {MACHINES_MAX} are allowed",
            "make two plans of it",
        )
    if count == 0:
        yield Problem("no_machine", "groups", "the plan has no machine", "add one to a group")
    names: dict[str, int] = {}
    places: dict[str, int] = {}
    for group in plan.groups:
        where = f"groups.{group.number - 1}"
        if group.name in names:
            yield Problem(
                "group_twice",
                f"{where}.name",
                f"groups {names[group.name]} and {group.number} are both called {group.name}",
                "give each group a name of its own",
            )
        names.setdefault(group.name, group.number)
        if count and not group.members and not group.acts:
            yield Problem(
                "empty_group",
                where,
                f"group {group.number} ({group.name}) has neither machines nor actions",
                "add a machine, or delete the group",
            )
        for member in group.members:
            key = member.reference.lower()
            if key in places:
                yield Problem(
                    "machine_twice",
                    member.where,
                    f"{member.reference} is in group {places[key]} and "
                    f"{'again' if places[key] == group.number else f'in group {group.number}'}",
                    "leave it in one group",
                )
            places.setdefault(key, group.number)
