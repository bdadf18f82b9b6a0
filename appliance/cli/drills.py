"""``understudy drills``: test failovers as evidence, by schedule or by hand."""

import re
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from appliance.cli.api_client import connect, part
from appliance.cli.failover_choice import (
    Compute,
    Network,
    Notes,
    PointChoice,
    asked_for,
    confirm,
    find_drill,
    read_script,
)
from appliance.cli.jobs import JobFailedError, watch
from appliance.cli.names import (
    Wait,
    Yes,
    complete_machine,
    complete_plan,
    complete_schedule,
)
from appliance.cli.output import (
    AsJson,
    Column,
    instant,
    print_json,
    print_line,
    print_pairs,
    print_rows,
    printable,
    span,
    state_style,
    text_or_dash,
    write_file,
)
from replication.errors import ConfigError, ConflictError

app = typer.Typer(
    no_args_is_help=True,
    help="Test failovers of a plan or a machine as evidence: they clean up by themselves, and "
    "leave a report.",
)

ENDED = frozenset({"passed", "failed"})
DrillId = Annotated[
    str,
    typer.Argument(
        metavar="ID|TARGET",
        help="A drill's id, as `drills list` shows it; or a plan or machine: its newest drill.",
    ),
]
PlanOption = Annotated[
    str | None,
    typer.Option(
        "--plan", metavar="PLAN", help="The recovery plan to try.", autocompletion=complete_plan
    ),
]
MachineOption = Annotated[
    str | None,
    typer.Option(
        "--machine",
        metavar="NAME",
        help="The machine to try, instead of a plan.",
        autocompletion=complete_machine,
    ),
]


GuestOption = Annotated[
    str | None,
    typer.Option(
        "--guest",
        metavar="auto|own|recovery",
        help="What boots: the machine's own system, or the recovery guest. With --machine; a plan "
        "says so itself.",
    ),
]
ScriptFile = Annotated[
    str | None,
    typer.Option(
        "--script",
        metavar="FILE",
        help="The recovery guest runs it, and exit code 0 passes. With --machine; a plan says so "
        "itself.",
    ),
]


@app.command("list")
def list_drills(
    *,
    count: Annotated[int, typer.Option("-n", help="How many at most.", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """List the drills, the newest first."""
    with connect() as api:
        found = api.items("/drills", count_max=count)
    if as_json:
        print_json(found)
        return
    print_rows(
        found,
        (
            Column("drill", "id"),
            Column("of", "target"),
            Column("state", "state", style=state_style),
            Column("begun", "began_ns", instant),
            Column("RTO", "rto_seconds", span, right=True),
            Column("schedule", "schedule", text_or_dash),
            Column("why", "reason", text_or_dash, wraps=True),
        ),
        as_json=False,
        none="There was no drill; hold one: understudy drills run --plan PLAN",
    )


@app.command()
def show(drill: DrillId, *, as_json: AsJson = False) -> None:
    """Show a drill: how far it is, or what came of it."""
    with connect() as api:
        found = api.get(f"/drills/{find_drill(api, drill)}")
    if as_json:
        print_json(found)
    else:
        _tell(found)


@app.command()
def run(
    *,
    plan: PlanOption = None,
    machine: MachineOption = None,
    point: PointChoice = "latest",
    network: Network = None,
    compute: Compute = None,
    guest: GuestOption = None,
    script: ScriptFile = None,
    notes: Notes = "",
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Hold a drill now, on a network of its own; replication goes on. With --wait: until it is
    cleaned up and its report is there.
    """
    body = _subject(plan, machine) | _options(guest, script)
    body |= asked_for(point, network, compute, notes)
    with connect() as api:
        found = api.post("/drills", body)
        if not wait:
            if as_json:
                print_json(found)
            else:
                print_line(f"drill {found['id']} of {found['target']} has begun.")
                print_line(f"Watch its job: understudy jobs {found['job']} --follow", style="dim")
            return
        ended = watch(
            lambda: dict(api.get(f"/drills/{part(found['id'])}")),
            is_over=lambda one: one["state"] in ENDED,
            draw=_draw,
            lines=_lines,
            quiet=as_json,
        )
    if as_json:
        print_json(ended)
    else:
        _tell(ended)
    if ended["state"] != "passed":
        raise JobFailedError(f"the drill of {ended['target']} failed: {ended['reason']}")


@app.command()
def report(
    drill: DrillId,
    *,
    html: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the page for people into this file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a drill's report: with --html the page, with --json the document, else in short."""
    if html is None:
        with connect() as api:
            found = api.get(f"/drills/{find_drill(api, drill)}")
        if found["report"] is None:
            raise ConflictError(
                f"the drill of {found['target']} is {found['state']}: it has no report yet",
                hint=f"wait for its end; its job: `understudy jobs {found['job']} --follow`",
            )
        if as_json:
            print_json(found["report"])
        else:
            _tell(found)
        return
    with connect() as api:
        drill = find_drill(api, drill)
        page = api.get_bytes(f"/drills/{drill}/report.html")
    write_file(html, page)
    if as_json:
        print_json({"drill": drill, "file": html})
    else:
        print_line(f"{html}: {len(page)} bytes; it opens in any browser, and prints.")


@app.command()
def schedule(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What you call it.")],
    *,
    plan: PlanOption = None,
    machine: MachineOption = None,
    every: Annotated[
        str | None, typer.Option(metavar="DAYS", help="1d, 7d, 90d; needs --at.")
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="HH:MM", help="With --every: the time of the day, in UTC.")
    ] = None,
    first: Annotated[
        str | None,
        typer.Option(
            metavar="DATE", help="With --every: the day that is counted from, as 2026-12-01."
        ),
    ] = None,
    cron: Annotated[
        str | None,
        typer.Option(
            metavar="FIELDS",
            help="Instead of --every: minute, hour, day, month, weekday, as '0 3 * * 6', in UTC.",
        ),
    ] = None,
    point: PointChoice = "latest",
    network: Network = None,
    compute: Compute = None,
    guest: GuestOption = None,
    script: ScriptFile = None,
    notes: Notes = "",
    as_json: AsJson = False,
) -> None:
    """Hold drills again and again: `--every 7d --at 03:00`, or `--cron '0 3 * * 6'`."""
    if (every is None) == (cron is None) or (every is not None and at is None):
        raise ConfigError(
            "say when the drills are held", hint="--every 7d --at 03:00, or --cron '0 3 * * 6'"
        )
    timing: dict[str, Any] = {"cron": cron, "at": at, "first": first}
    if every is not None:
        found = re.fullmatch(r"(\d{1,3})d?", every)
        if found is None:
            raise ConfigError(f"--every: {every!r:.40} is no number of days", hint="as in 7d")
        timing["every_days"] = int(found[1])
    body = _subject(plan, machine) | _options(guest, script)
    body |= {
        "name": name,
        "timing": {key: value for key, value in timing.items() if value is not None},
        "point": point,
        "network": network,
        "compute": compute,
        "notes": notes,
    }
    with connect() as api:
        made = api.post("/drill-schedules", body)
    if as_json:
        print_json(made)
    else:
        print_line(f"{name}: {made['told']}; next {instant(made['next_ns'])}.")


@app.command()
def schedules(*, as_json: AsJson = False) -> None:
    """List the schedules: what is tried when, and next."""
    with connect() as api:
        found = api.items("/drill-schedules")
    print_rows(
        [{**one, "of": one["plan"] or one["machine"]} for one in found],
        (
            Column("schedule", "name"),
            Column("of", "of"),
            Column("when", "told"),
            Column("next", "next_ns", instant),
            Column("last", "last_ns", instant),
        ),
        as_json=as_json,
        none="No drill is scheduled: see `understudy drills schedule --help`",
    )


@app.command()
def unschedule(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="As `drills schedules` shows it.",
            autocompletion=complete_schedule,
        ),
    ],
    *,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete a schedule: no more of its drills are held; their reports are kept."""
    confirm(f"Hold no more drills of the schedule {name}?", yes=yes)
    with connect() as api:
        api.delete(f"/drill-schedules/{part(name)}")
    if as_json:
        print_json({"name": name, "deleted": True})
    else:
        print_line(f"{name}: deleted.")


def _subject(plan: str | None, machine: str | None) -> dict[str, Any]:
    if (plan is None) == (machine is None):
        raise ConfigError("say what the drill is of", hint="--plan PLAN or --machine MACHINE")
    return {"plan": plan} if plan is not None else {"machine": machine}


def _options(guest: str | None, script: str | None) -> dict[str, Any]:
    """How the VM of a machine is made; a plan says so itself."""
    given: dict[str, Any] = {}
    if guest is not None:
        given["guest"] = guest
    if script is not None:
        given["script"] = read_script(script)
    return given


def _tell(found: dict[str, Any]) -> None:
    document = found.get("report") or {}
    pairs = [
        ("drill", found["id"]),
        ("of", found["target"]),
        ("state", found["state"]),
        ("schedule", text_or_dash(found.get("schedule"))),
        ("job", text_or_dash(found.get("job"))),
        ("begun", instant(found["began_ns"])),
        ("ended", instant(found.get("ended_ns"))),
        ("RTO", span(found.get("rto_seconds"))),
        ("why", text_or_dash(found.get("reason"))),
    ]
    if document:
        digest = document["digest"]
        pairs.append(("digest", digest if found["untouched"] else f"{digest}: IT DOES NOT FIT"))
    print_pairs(pairs)
    if not document:
        for line in _step_lines(found):
            print_line(f"  {line}")
        return
    print_rows(
        document["machines"],
        (
            Column("group", "group", right=True),
            Column("machine", "machine"),
            Column("passed", "passed", lambda passed: "yes" if passed else "no"),
            Column("point", "point", text_or_dash),
            Column("consistency", "consistency", text_or_dash),
            Column("RTO", "rto_seconds", span, right=True),
            Column("RPO", "rpo_seconds", span, right=True),
            Column("check", "check", text_or_dash, wraps=True),
        ),
        as_json=False,
        none="No machine was tried.",
    )
    if found["state"] in ENDED:
        print_line(f"The page: understudy drills report {found['id']} --html FILE", style="dim")


def _draw(found: dict[str, Any]) -> Group:
    head = Text(printable(f"drill of {found['target']}  "), style="bold")
    head.append(found["state"], style=state_style(found["state"]))
    return Group(head, *(Text(f"  {line}") for line in _step_lines(found)))


def _lines(found: dict[str, Any]) -> list[str]:
    return [f"drill of {found['target']}: {found['state']}", *_step_lines(found)]


def _step_lines(found: dict[str, Any]) -> list[str]:
    return [
        printable(
            f"{step['name']}: {step['state']}" + (f", {step['note']}" if step["note"] else "")
        )
        for step in found["steps"]
        if step["state"] != "pending"
    ]
