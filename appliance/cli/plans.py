"""``understudy plans``: which machines are recovered in which order, and what is done besides."""

import json
import os
import shlex
import subprocess
import tempfile
from typing import Annotated, Any

import typer

from appliance.cli import plan_runs
from appliance.cli.api_client import ApiClient, connect, part
from appliance.cli.failover_choice import PointChoice, confirm
from appliance.cli.names import PlanName, Yes
from appliance.cli.output import (
    AsJson,
    Column,
    first_line,
    instant,
    print_json,
    print_line,
    print_rows,
    read_file,
    write_file,
)
from replication.errors import ConfigError, ConflictError, InputError, NotFoundError

app = typer.Typer(no_args_is_help=True, help="Recovery plans.")
app.add_typer(plan_runs.app)

EDITOR_DEFAULT = "vi"
NewName = Annotated[str, typer.Argument(metavar="NAME", help="What it is to be called.")]


@app.command("list")
def list_plans(*, as_json: AsJson = False) -> None:
    """List the recovery plans."""
    with connect() as api:
        found = api.items("/plans")
    if as_json:
        print_json(found)
        return
    print_rows(
        found,
        (
            Column("plan", "name"),
            Column("groups", "group_count", right=True),
            Column("machines", "machine_count", right=True),
            Column("changed", "updated_ns", instant),
            Column("description", "description", first_line, wraps=True),
        ),
        as_json=False,
        none="There is no plan; make one: understudy plans create NAME --group web=web-1,web-2",
    )


@app.command()
def create(
    name: NewName,
    *,
    group: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=MACHINE,…", help="A group and its machines; repeatable, in their order."
        ),
    ],
    description: Annotated[str, typer.Option(metavar="TEXT", help="What it is for.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a plan of machines alone; `plans edit` or `plans import` add the rest."""
    groups = []
    for text in group:
        label, _, machines = text.partition("=")
        named = [one.strip() for one in machines.split(",") if one.strip()]
        if not label.strip() or not named:
            raise ConfigError(f"--group: {text!r:.80} is no group", hint="as in web=web-1,web-2")
        groups.append({"name": label.strip(), "machines": [{"machine": one} for one in named]})
    with connect() as api:
        made = api.post("/plans", {"name": name, "description": description, "groups": groups})
    _tell_stored(made, "made", as_json=as_json)


@app.command()
def edit(
    plan: PlanName,
    *,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", metavar="FILE", help="Take this YAML; no editor is opened."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change a plan in $EDITOR, as YAML."""
    with connect() as api:
        found = api.get(f"/plans/{part(plan)}")
        text = read_file(file) if file is not None else _edited(_yaml(found["plan"]))
        if text is None:
            print_line(f"{plan}: nothing was changed.")
            return
        try:
            body = {"plan": _parsed(text), "revision": found["revision"]}
            stored = api.put(f"/plans/{part(plan)}", body)
        except (InputError, ConflictError):
            if file is None:
                kept = _keep(text)
                print_line(
                    f"What you wrote is in {kept}: understudy plans edit {plan} --file {kept}"
                )
            raise
    _tell_stored(stored, "changed", as_json=as_json)


@app.command()
def show(plan: PlanName, *, as_json: AsJson = False) -> None:
    """Show a plan: its groups in their order, with what is done before and after."""
    with connect() as api:
        found = api.get(f"/plans/{part(plan)}")
    if as_json:
        print_json(found)
        return
    document = found["plan"]
    print_line(document["name"], style="bold")
    if document.get("description"):
        print_line(document["description"])
    for number, group in enumerate(document["groups"], 1):
        print_line(f"{number}. {group['name']}", style="bold")
        for action in group.get("before", []):
            print_line(f"   before: {_action(action)}")
        for one in group.get("machines", []):
            print_line(f"   {one['machine']}")
        for action in group.get("after", []):
            print_line(f"   after: {_action(action)}")
    print_line(f"revision {found['revision']}, {instant(found['updated_ns'])}", style="dim")


@app.command()
def delete(plan: PlanName, *, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete a plan; its runs and drills are kept."""
    with connect() as api:
        told = _told_open(plan, plan_runs.open_runs(api, plan))
        confirm(f"Delete the plan {plan}?{told}", yes=yes)
        api.delete(f"/plans/{part(plan)}")
    if as_json:
        print_json({"name": plan, "deleted": True})
    else:
        print_line(f"{plan}: deleted.{told}")


@app.command()
def clone(plan: PlanName, name: NewName, *, as_json: AsJson = False) -> None:
    """Copy a plan under another name."""
    with connect() as api:
        made = api.post(f"/plans/{part(plan)}/clone", {"name": name})
    _tell_stored(made, "made", as_json=as_json)


@app.command()
def validate(
    plan: PlanName,
    *,
    kind: Annotated[str, typer.Option(metavar="KIND", help="test, planned, unplanned.")] = "test",
    point: PointChoice = "latest",
    as_json: AsJson = False,
) -> None:
    """Say whether a plan could run now, and if not, why. Exit code 9 when it could not."""
    with connect() as api:
        found = api.get(f"/plans/{part(plan)}/validation", {"kind": kind, "point": point})
    if as_json:
        print_json(found)
    else:
        _tell_problems(found["problems"])
    if not found["valid"]:
        raise InputError(f"the plan {plan} cannot run as things are")
    if not as_json:
        print_line(f"{plan} can run.", style="green")


@app.command("export")
def export_plan(
    plan: PlanName,
    *,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Instead of printing it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a plan as YAML, or as JSON, which `import` takes as well. Values of webhooks' headers
    are hidden.
    """
    with connect() as api:
        document = api.get(f"/plans/{part(plan)}")["plan"]
    text = json.dumps(document, indent=2) + "\n" if as_json else _yaml(document)
    if output is not None:
        write_file(output, text.encode())
    else:
        typer.echo(text, nl=False)


@app.command("import")
def import_plan(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML, or - for standard input.")],
    *,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Instead of its own.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of the plan of that name.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a plan of a YAML file. What is wrong in it is told with its line."""
    document = _parsed(read_file(file))
    if name is not None:
        document["name"] = name
    with connect() as api:
        revision = _revision(api, document["name"]) if replace else None
        if revision is None:
            made = api.post("/plans", document)
        else:
            path = f"/plans/{part(document['name'])}"
            made = api.put(path, {"plan": document, "revision": revision})
    _tell_stored(made, "imported", as_json=as_json)


def _tell_stored(stored: dict[str, Any], verb: str, *, as_json: bool) -> None:
    if as_json:
        print_json(stored)
        return
    print_line(f"{stored['plan']['name']}: {verb}.")
    _tell_problems(stored["problems"])


def _tell_problems(problems: list[dict[str, Any]]) -> None:
    for problem in problems:
        style = "red" if problem["fatal"] else "yellow"
        hint = f" ({problem['hint']})" if problem.get("hint") else ""
        print_line(f"  {problem['message']}{hint}", style=style)


def _told_open(plan: str, runs: list[dict[str, Any]]) -> str:
    """What becomes of a plan's runs that are open, when it is deleted."""
    if not runs:
        return ""
    which = ", ".join(f"{run['id']} ({run['kind']})" for run in runs)
    return (
        f" Runs of it that are open stay so: {which}; `understudy plans cleanup {plan}` "
        "ends a test, `understudy failover` others."
    )


def _action(action: dict[str, Any]) -> str:
    kind = next(each for each in ("script", "manual", "webhook") if action.get(each))
    return f"{action['name']} ({kind})"


def _parsed(text: str) -> dict[str, Any]:
    """The document of a YAML text; PlanTextError names what is wrong, with its line."""
    from appliance.config_server.recovery.plans.yaml_text import parse_plan  # noqa: PLC0415 - slow

    return parse_plan(text).model_dump(mode="json")


def _yaml(document: dict[str, Any]) -> str:
    from appliance.config_server.recovery.plans.document import PlanDocument  # noqa: PLC0415
    from appliance.config_server.recovery.plans.yaml_text import write_plan  # noqa: PLC0415

    return write_plan(PlanDocument.model_validate(document))


def _revision(api: ApiClient, name: str) -> int | None:
    try:
        return int(api.get(f"/plans/{part(name)}")["revision"])
    except NotFoundError:
        return None


def _edited(text: str) -> str | None:
    """What somebody makes of a text; None when it is as it was."""
    path = _keep(text)
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or EDITOR_DEFAULT
    try:
        ended = subprocess.run([*shlex.split(editor), path], check=False)
        if ended.returncode:
            raise ConfigError(f"{editor} ended with exit code {ended.returncode}: nothing changed")
        changed = read_file(path)
    except OSError as error:
        raise ConfigError(f"cannot start {editor}: {error.strerror}", hint="set EDITOR") from error
    finally:
        os.unlink(path)
    return None if changed == text else changed


def _keep(text: str) -> str:
    """In a file of its own; its path."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="understudy-plan-", suffix=".yaml", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
        return file.name
