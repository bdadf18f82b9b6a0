"""A plan as YAML: read with the line of whatever is wrong, and written.

YAML's JSON-like core only: no anchors, aliases, tags or merges, so a text is as large as what it
says and has no cycles. Words such as ``no`` and ``22:00`` stay words.

Source: yaml.org/spec/1.2.2 (§10.3 core schema); docs/RECOVERY.md §5;
docs/adr/0016-pyyaml-for-plans.md.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from appliance.config_server.recovery.plans.document import PlanDocument
from appliance.config_server.recovery.plans.plan import Plan, Problem, shape_problems
from replication.errors import InputError

TEXT_BYTES_MAX = 1 << 20
DEPTH_MAX = 20
PROBLEMS_TOLD_MAX = 20
_BLOCK = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?\n+)(?:(?:[ -~]*[!-~])?\n)*(?:[ -~]*[!-~]\n?)?")
"""Lines that can be written one below the other: of plain characters, none ending in spaces."""


class PlanTextError(InputError):
    """A text that is no plan. Its message names each place and line."""

    code = "plan"


class _Words(yaml.SafeLoader):  # type: ignore[misc]  # it has no types
    """Knows only the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]{1,18}$", list("-+0123456789")),
):
    _Words.add_implicit_resolver(_tag, re.compile(_pattern), _first)


@dataclass(frozen=True, slots=True)
class Read:
    """A text's tree, and the line of each place in it, counted from 1."""

    tree: Any
    lines: Mapping[str, int]

    def line(self, where: str) -> int:
        """The line of a place, or of the nearest one around it that is written down."""
        while where not in self.lines:
            where, _, _ = where.rpartition(".")
        return self.lines[where]


def read_yaml(text: str) -> Read:
    """Raise PlanTextError for what is not YAML, or more than its core."""
    if len(text.encode(errors="surrogatepass")) > TEXT_BYTES_MAX:
        raise PlanTextError(f"the text is longer than {TEXT_BYTES_MAX >> 10} KiB")
    try:
        for token in yaml.scan(text, Loader=_Words):
            _refuse_token(token)
        loader = _Words(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise PlanTextError(f"{where}{error.problem or 'this is not YAML'}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise PlanTextError(f"this is not YAML: {str(error).splitlines()[0]}") from error
    if root is None:
        raise PlanTextError(
            "the text is empty", hint="`understudy plans export` shows how it looks"
        )
    lines: dict[str, int] = {}
    return Read(_value(root, "", lines, 0), lines)


def _refuse_token(token: Any) -> None:
    what = {
        yaml.AnchorToken: "an anchor (&…)",
        yaml.AliasToken: "an alias (*…)",
        yaml.TagToken: "a tag (!…)",
        yaml.DirectiveToken: "a directive (%…)",
    }.get(type(token))
    if what is not None:
        raise PlanTextError(
            f"line {token.start_mark.line + 1}: {what} is not allowed in a plan",
            hint="write it out, or put the text into quotes",
        )


def _value(node: Any, where: str, lines: dict[str, int], depth: int) -> Any:
    lines[where] = node.start_mark.line + 1
    if depth > DEPTH_MAX:
        raise PlanTextError(f"line {lines[where]}: nested too deeply")
    if isinstance(node, yaml.MappingNode):
        tree: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise PlanTextError(f"line {line}: a key is a word")
            key = str(key_node.value)
            if key in tree:
                raise PlanTextError(
                    f"line {line}: {_place(_join(where, key))} is there twice",
                    hint=f"it is also in line {lines[_join(where, key)]}",
                )
            tree[key] = _value(value_node, _join(where, key), lines, depth + 1)
            lines[_join(where, key)] = line
        return tree
    if isinstance(node, yaml.SequenceNode):
        return [
            _value(item, _join(where, str(index)), lines, depth + 1)
            for index, item in enumerate(node.value)
        ]
    return _scalar(node)


def _scalar(node: Any) -> Any:
    text = str(node.value)
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text)
    return text


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def parse_plan(text: str) -> PlanDocument:
    """A plan from YAML (or JSON, which is YAML). A machine may be its name alone.

    Raises PlanTextError that names every place that is wrong, with its line.
    """
    read = read_yaml(text)
    tree = _expanded(read.tree)
    try:
        document = PlanDocument.model_validate(tree)
    except ValidationError as error:
        raise PlanTextError(_told(read, _places(error))) from error
    problems = shape_problems(Plan.of(document))
    if problems:
        raise PlanTextError(_told(read, tuple((each.where, each.message) for each in problems)))
    return document


def _expanded(tree: Any) -> Any:
    """With machines that are names as the documents they stand for."""
    if not isinstance(tree, dict) or not isinstance(tree.get("groups"), list):
        return tree
    groups = []
    for group in tree["groups"]:
        if isinstance(group, dict) and isinstance(group.get("machines"), list):
            machines = [
                {"machine": one} if isinstance(one, str) else one for one in group["machines"]
            ]
            groups.append({**group, "machines": machines})
        else:
            groups.append(group)
    return {**tree, "groups": groups}


def _places(error: ValidationError) -> tuple[tuple[str, str], ...]:
    """That a list is too short is not so where what is in it is wrong, which is told as well."""
    problems = error.errors()
    return tuple(
        (".".join(_steps(problem["loc"])), _sentence(problem))
        for problem in problems
        if problem["type"] != "too_short"
        or not any(_is_inside(other["loc"], problem["loc"]) for other in problems)
    )


def _is_inside(loc: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(loc) > len(outer) and loc[: len(outer)] == outer


def _steps(loc: tuple[int | str, ...]) -> Iterator[str]:
    """Without the names of a union's branches, which are no places in a text."""
    return (str(step) for step in loc if not (isinstance(step, str) and not step.islower()))


def _sentence(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return "unknown key; check its spelling"
    if problem["type"] == "missing":
        return "is missing"
    return str(problem["msg"]).removeprefix("Value error, ")


def _told(read: Read, places: tuple[tuple[str, str], ...]) -> str:
    told = [
        f"line {read.line(where)}: {_place(where)}: {message}" if where else message
        for where, message in places[:PROBLEMS_TOLD_MAX]
    ]
    if len(places) > PROBLEMS_TOLD_MAX:
        told.append(f"and {len(places) - PROBLEMS_TOLD_MAX} more")
    return "; ".join(told)


def _place(where: str) -> str:
    """``groups.0.machines.1`` as people count: ``groups[1].machines[2]``."""
    told = ""
    for step in where.split("."):
        told += f"[{int(step) + 1}]" if step.isdecimal() else f".{step}" if told else step
    return told


def locate(text: str, problems: tuple[Problem, ...]) -> tuple[str, ...]:
    """Each problem as a line that names its place in ``text``."""
    read = read_yaml(text)
    return tuple(f"line {read.line(each.where)}: {each.message}" for each in problems)


class _Writer(yaml.SafeDumper):  # type: ignore[misc]  # it has no types
    """Texts of several lines as blocks; lists indented below their key; no aliases.

    It quotes what `_Words` would take for something else than a text.
    """

    yaml_implicit_resolvers = _Words.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        del indentless
        super().increase_indent(flow, False)


def _write_text(writer: _Writer, text: str) -> Any:
    style = "|" if _BLOCK.fullmatch(text) else None if text.isprintable() else '"'
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Writer.add_representer(str, _write_text)


def write_plan(document: PlanDocument) -> str:
    """A plan as YAML that `parse_plan` reads back as the same; without what is as by default."""
    tree = document.model_dump(mode="json", exclude_defaults=True)
    for group in tree["groups"]:
        group["machines"] = [
            one["machine"] if set(one) == {"machine"} else one for one in group.get("machines", [])
        ]
    return str(yaml.dump(tree, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=100))
