"""``understudy jobs``: what the config server was asked to do, and how far it is."""

import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from appliance.cli.api_client import ApiClient, connect, part
from appliance.cli.default_group import DEFAULT, DefaultGroup
from appliance.cli.failover_choice import confirm
from appliance.cli.names import Wait, Yes, complete_machine
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
)
from replication.errors import ConfigError, LimitError, ReplicationError, UnavailableError

POLL_SECONDS = 1.0
LISTED_DEFAULT = 20
AWAY_SECONDS_MAX = 300.0
ENDED = frozenset({"succeeded", "failed", "cancelled"})
_MARKS = {
    "pending": ("·", "dim"),
    "running": ("▸", "cyan"),
    "done": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "skipped": ("-", "dim"),
}


class JobFailedError(ReplicationError):
    """A job that was waited for did not succeed; its error says why."""

    code = "job_failed"


app = typer.Typer(
    cls=DefaultGroup,
    help="What the config server was asked to do, and how far it is. `jobs` lists the newest; "
    "`jobs ID` shows one with its steps, `--follow` until it ends, `--cancel` stops it.",
)


@app.command(DEFAULT)
def list_jobs(
    job: Annotated[str | None, typer.Argument(metavar="[ID]", help="Show this one.")] = None,
    *,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Show the steps until it ends; without an ID, of the newest."
        ),
    ] = False,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Stop it: it takes back what it has begun.")
    ] = False,
    yes: Yes = False,
    state: Annotated[
        str | None,
        typer.Option(
            metavar="STATE", help="Only queued, running, succeeded, failed or cancelled ones."
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Only of this machine, or of this recovery plan.",
            autocompletion=complete_machine,
        ),
    ] = None,
    count: Annotated[int, typer.Option("-n", help="How many at most.", min=1)] = LISTED_DEFAULT,
    as_json: AsJson = False,
) -> None:
    """List the newest jobs, or show one."""
    if job is None and cancel:
        raise ConfigError("say which job is to be cancelled", hint="understudy jobs ID --cancel")
    with connect() as api:
        if job is None:
            params = {"state": state, "machine": machine}
            _list(api, params, count, follow=follow, as_json=as_json)
            return
        if cancel:
            found = api.get(f"/jobs/{part(job)}")
            confirm(
                f"Cancel job {found['id']}, {found['kind']} {found['target']}? "
                "What it has begun is taken back.",
                yes=yes,
            )
            api.post(f"/jobs/{part(job)}/cancel")
        if follow:
            follow_job(api, job, as_json=as_json)
            return
        found = api.get(f"/jobs/{part(job)}")
    if as_json:
        print_json(found)
    else:
        _tell(found)


@app.command()
def resume(
    job: Annotated[
        str, typer.Argument(metavar="ID", help="The job that waits; `jobs ID` says for what.")
    ],
    *,
    note: Annotated[
        str, typer.Option(metavar="TEXT", help="What was done; kept with the run.")
    ] = "",
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Say that a manual action of a recovery plan is done: its job goes on."""
    with connect() as api:
        found = api.post(f"/jobs/{part(job)}/resume", {"note": note})
        if wait:
            follow_job(api, job, as_json=as_json)
        elif as_json:
            print_json(found)
        else:
            print_line(f"{found['kind']} {found['target']}: job {job} goes on.")


def follow_job(api: ApiClient, job: str, *, as_json: bool, quiet: bool = False) -> dict[str, Any]:
    """Show a job until it ends, and return it; JobFailedError when it did not succeed."""
    ended = watch(
        lambda: dict(api.get(f"/jobs/{part(job)}")),
        is_over=lambda found: found["state"] in ENDED,
        draw=_draw,
        lines=_step_lines,
        quiet=as_json or quiet,
    )
    if as_json:
        print_json(ended)
    if ended["state"] != "succeeded":
        error = ended.get("error") or {}
        told = error.get("message") or f"it was {ended['state']}"
        raise JobFailedError(
            f"{ended['kind']} {ended['target']}: {told}",
            hint=error.get("hint") or f"`understudy jobs {ended['id']}` shows its steps",
        )
    return ended


def started(api: ApiClient, job: dict[str, Any], *, wait: bool, as_json: bool) -> None:
    """Tell of a job that was just begun; wait for it if asked to."""
    if wait:
        follow_job(api, job["id"], as_json=as_json)
    elif as_json:
        print_json(job)
    else:
        print_line(f"{job['kind']} {job['target']}: job {job['id']} has begun.")
        print_line(f"Watch it: understudy jobs {job['id']} --follow", style="dim")


def watch(
    read: Callable[[], dict[str, Any]],
    *,
    is_over: Callable[[dict[str, Any]], bool],
    draw: Callable[[dict[str, Any]], Group],
    lines: Callable[[dict[str, Any]], list[str]],
    quiet: bool,
) -> dict[str, Any]:
    """Read again and again and show it, until it is over: live on a terminal, as lines elsewhere.

    A config server that is away for a while, as in a restart, is waited for.
    """
    console = Console(stderr=True, highlight=False)
    is_live = sys.stderr.isatty() and not quiet
    told: set[str] = set()
    with Live(console=console, refresh_per_second=8) if is_live else _Nothing() as live:
        while True:
            found = _patiently(read)
            if live is not None:
                live.update(draw(found))
            elif not quiet:
                for line in lines(found):
                    if line not in told:
                        told.add(line)
                        print_line(line)
            if is_over(found):
                return found
            time.sleep(POLL_SECONDS)


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _patiently(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    until = time.monotonic() + AWAY_SECONDS_MAX
    while True:
        try:
            return read()
        except (UnavailableError, LimitError):
            if time.monotonic() > until:
                raise
            time.sleep(POLL_SECONDS)


def _list(
    api: ApiClient, params: dict[str, str | None], count: int, *, follow: bool, as_json: bool
) -> None:
    found = api.items("/jobs", params, count_max=count)
    if follow and found:
        follow_job(api, found[0]["id"], as_json=as_json)
        return
    if as_json:
        print_json(found)
        return
    rows = [{**job, "step": _current(job), "took": _took(job)} for job in found]
    print_rows(
        rows,
        (
            Column("job", "id"),
            Column("what", "kind"),
            Column("machine", "target"),
            Column("state", "state", style=state_style),
            Column("begun", "created_ns", instant),
            Column("took", "took", span, right=True),
            Column("by", "asked_by"),
            Column("step", "step", wraps=True),
        ),
        as_json=False,
        none="There are no jobs.",
    )


def _current(job: dict[str, Any]) -> str:
    """What it is at, or why it failed."""
    if job.get("error"):
        return str(job["error"].get("message", ""))
    for step in job["steps"]:
        if step["state"] == "running":
            return " ".join(part for part in (step["name"], step.get("note")) if part)
    done = sum(step["state"] == "done" for step in job["steps"])
    return f"{done} of {len(job['steps'])} done" if job["state"] not in ENDED else ""


def _took(job: dict[str, Any]) -> float:
    end_ns = job.get("ended_ns") or time.time_ns()
    return max(0.0, float(end_ns - job["created_ns"]) / 1e9)


def _tell(job: dict[str, Any]) -> None:
    print_pairs(
        [
            ("job", job["id"]),
            ("what", f"{job['kind']} {job['target']}"),
            ("state", _state(job)),
            ("asked by", job["asked_by"]),
            ("begun", instant(job["created_ns"])),
            ("took", span(_took(job))),
        ]
    )
    for line in _step_lines(job, pending=True):
        print_line(f"  {line}")
    if job.get("error"):
        print_line(f"error: {job['error'].get('message', '')}", style="red")
        if job["error"].get("hint"):
            print_line(f"hint: {job['error']['hint']}")


def _state(job: dict[str, Any]) -> str:
    is_ending = job.get("cancel_asked") and job["state"] not in ENDED
    return f"{job['state']}, is asked to stop" if is_ending else str(job["state"])


def _step_lines(job: dict[str, Any], *, pending: bool = False) -> list[str]:
    lines = []
    for step in job["steps"]:
        mark, _ = _MARKS.get(step["state"], ("?", ""))
        note = f": {step['note']}" if step.get("note") else ""
        if pending or step["state"] != "pending":
            lines.append(f"{mark} {step['name']}{note}")
    return lines


def _draw(job: dict[str, Any]) -> Group:
    table = Table(box=None, pad_edge=False, show_header=False)
    for step in job["steps"]:
        mark, style = _MARKS.get(step["state"], ("?", ""))
        begun, ended = step.get("started_ns"), step.get("ended_ns")
        took = span(((ended or time.time_ns()) - begun) / 1e9) if begun else ""
        table.add_row(
            Text(f"  {mark}", style=style),
            Text(printable(step["name"])),
            Text(took, style="dim", justify="right"),
            Text(printable(step.get("note") or ""), style="dim"),
        )
    head = Text(printable(f"{job['kind']} {job['target']}  "), style="bold")
    head.append(job["state"], style=state_style(job["state"]))
    return Group(head, table)
