"""``understudy plans test|run|cleanup|runs``: a plan at work."""

from typing import Annotated, Any

import typer

from appliance.cli.api_client import ApiClient, connect, part
from appliance.cli.failover_choice import (
    Compute,
    Network,
    NoShutDown,
    Notes,
    PointChoice,
    asked_for,
    confirm,
    told_network,
)
from appliance.cli.jobs import follow_job, started
from appliance.cli.names import PlanName, Wait, Yes, is_id
from appliance.cli.output import (
    AsJson,
    Column,
    first_line,
    instant,
    print_json,
    print_line,
    print_rows,
    span,
    state_style,
    text_or_dash,
)
from replication.errors import ConfigError, NotFoundError

app = typer.Typer()


@app.command("test")
def try_out(
    plan: PlanName,
    *,
    point: PointChoice = "latest",
    network: Network = None,
    compute: Compute = None,
    notes: Notes = "",
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Try a plan on a network of its own; replication goes on."""
    body = {"kind": "test", **asked_for(point, network, compute, notes)}
    _run(plan, body, wait=wait, as_json=as_json)


@app.command()
def run(
    plan: PlanName,
    *,
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="planned|unplanned", help="Does the first site still live? Must be given."
        ),
    ] = None,
    point: PointChoice = "latest",
    network: Network = None,
    compute: Compute = None,
    no_shut_down: NoShutDown = False,
    notes: Notes = "",
    yes: Yes = False,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Fail all machines of a plan over."""
    if kind not in ("planned", "unplanned"):
        told = "say which kind of failover" if kind is None else f"--kind: {kind!r:.40} is none"
        raise ConfigError(
            told,
            hint="--kind planned (the first site lives: nothing is lost) or --kind unplanned",
        )
    confirm(f"Run all machines of {plan} at the second site ({kind})?", yes=yes)
    body = {"kind": kind, **asked_for(point, network, compute, notes)}
    _run(plan, {**body, "shut_down": not no_shut_down}, wait=wait, as_json=as_json)


@app.command()
def cleanup(
    plan: PlanName,
    *,
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="ID", help="The newest test if not given.")
    ] = None,
    notes: Notes = "",
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Remove all of a plan's test; the notes stay."""
    _refuse_no_id(plan, run_id)
    with connect() as api:
        if run_id is None:
            tests = open_runs(api, plan, kind="test")
            if not tests:
                raise NotFoundError(
                    f"no test of {plan} is to be cleaned up", hint=f"`understudy plans runs {plan}`"
                )
            run_id = str(tests[0]["id"])
            _tell_others(plan, tests[1:])
        job = api.post(f"/runs/{part(run_id)}/cleanup", {"notes": notes})
        started(api, job, wait=wait, as_json=as_json)
        if wait and not as_json:
            print_line(f"Nothing is left of this test of {plan} but its notes and its consoles.")


@app.command()
def runs(
    plan: PlanName,
    *,
    run_id: Annotated[str | None, typer.Option("--run", metavar="ID", help="One, whole.")] = None,
    count: Annotated[int, typer.Option("-n", help="How many at most.", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """List a plan's runs, the newest first, or show one."""
    _refuse_no_id(plan, run_id)
    with connect() as api:
        if run_id is not None:
            one = api.get(f"/runs/{part(run_id)}")
            if as_json:
                print_json(one)
            else:
                _tell_run(one)
            return
        found = api.items(f"/plans/{part(plan)}/runs", count_max=count)
    print_rows(
        found,
        (
            Column("run", "id"),
            Column("kind", "kind"),
            Column("state", "state", style=state_style),
            Column("machines", "machine_count", right=True),
            Column("up", "up_count", right=True),
            Column("asked", "asked_ns", instant),
            Column("by", "asked_by"),
            Column("notes", "notes", first_line, wraps=True),
        ),
        as_json=as_json,
        none=f"{plan} has never run.",
    )


def _run(plan: str, body: dict[str, Any], *, wait: bool, as_json: bool) -> None:
    with connect() as api:
        others = open_runs(api, plan, kind="test") if body["kind"] == "test" else []
        job = api.post(f"/plans/{part(plan)}/runs", body)
        _tell_others(plan, others)
        if not wait:
            started(api, job, wait=False, as_json=as_json)
            if not as_json:
                print_line(told_network(body["kind"], body["network"]), style="dim")
            return
        follow_job(api, job["id"], as_json=False, quiet=as_json)
        newest = api.items(f"/plans/{part(plan)}/runs", count_max=20)
        run_id = next(each["id"] for each in newest if each["job"] == job["id"])
        found = api.get(f"/runs/{run_id}")
    if as_json:
        print_json(found)
    else:
        _tell_run(found)


def open_runs(api: ApiClient, plan: str, *, kind: str | None = None) -> list[dict[str, Any]]:
    """Those of a plan of which there are, or may be, VMs; the newest first."""
    runs = api.items(f"/plans/{part(plan)}/runs")
    return [run for run in runs if run["open"] and kind in (None, run["kind"])]


def _tell_others(plan: str, tests: list[dict[str, Any]]) -> None:
    """On standard error: tests that are easily forgotten."""
    for run in (each for each in tests if each["drill"] is None):  # a drill cleans up by itself
        typer.echo(
            f"another test of {plan} is open, of {instant(run['asked_ns'])}: "
            f"`understudy plans cleanup {plan} --run {run['id']}`",
            err=True,
        )


def _refuse_no_id(plan: str, run: str | None) -> None:
    if run is not None and not is_id(run):
        raise NotFoundError(f"there is no run {run}", hint=f"`understudy plans runs {plan}`")


def _tell_run(found: dict[str, Any]) -> None:
    print_line(f"{found['plan'] or 'run'} {found['id']}: {found['kind']}, {found['state']}")
    print_rows(
        found["failovers"],
        (
            Column("group", "group", right=True),
            Column("machine", "machine"),
            Column("state", "state", style=state_style),
            Column("point", "point", text_or_dash),
            Column("RTO", "rto_seconds", span, right=True),
            Column("RPO", "rpo_seconds", span, right=True),
            Column("why", "error", _reason, wraps=True),
        ),
        as_json=False,
        none="It has no machines.",
    )
    for action in found["actions"]:
        told = f": {action['detail']}" if action["detail"] else ""
        turn = f"{action['place']} group {action['group']}"
        print_line(f"  {turn}, {action['name']}: {action['state']}{told}")


def _reason(error: Any) -> str:
    return str(error.get("message", "")) if isinstance(error, dict) else ""
