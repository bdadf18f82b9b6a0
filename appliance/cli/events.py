"""``understudy events``: what a person should know."""

import time
from typing import Annotated, Any

import typer

from appliance.cli.api_client import ApiClient, connect
from appliance.cli.names import complete_machine, parse_duration
from appliance.cli.output import (
    AsJson,
    Column,
    instant,
    print_json,
    print_line,
    print_rows,
    state_style,
)
from replication.errors import LimitError, UnavailableError

LISTED_DEFAULT = 50
POLL_SECONDS = 2.0
OVERLAP_SECONDS = 60
TOLD_MAX = 10_000


def events(
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Then show what comes, until Ctrl-C.")
    ] = False,
    only_open: Annotated[bool, typer.Option("--open", help="Only what is not over.")] = False,
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Of this machine or component.", autocompletion=complete_machine
        ),
    ] = None,
    severity: Annotated[
        str | None, typer.Option(metavar="SEVERITY", help="warning or critical.")
    ] = None,
    since: Annotated[str | None, typer.Option(metavar="SPAN", help="Of the last 2h, 3d, …")] = None,
    count: Annotated[int, typer.Option("-n", help="How many at most.", min=1)] = LISTED_DEFAULT,
    long: Annotated[
        bool, typer.Option("--long", "-l", help="With cause and recommended action.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List events, newest last: what is wrong, since when, and what to do."""
    params: dict[str, Any] = {"machine": machine, "severity": severity}
    if only_open:
        params["open"] = True
    listed = {**params}
    if since is not None:
        listed["since_ns"] = time.time_ns() - parse_duration(since, "--since") * 10**9
    with connect() as api:
        found = api.items("/events", listed, count_max=count)[::-1]
        if as_json and not follow:
            print_json(found)
            return
        if follow:
            _follow(api, params, found, long=long, as_json=as_json)
            return
    if long:
        for event in found:
            _tell(event, long=True)
        return
    print_rows(
        [{**event, "state": "over" if event["cleared_ns"] else "open"} for event in found],
        (
            Column("since", "at_ns", instant),
            Column("severity", "severity", style=state_style),
            Column("source", "source"),
            Column("state", "state"),
            Column("what", "message", wraps=True),
        ),
        as_json=False,
        none="There are no such events.",
    )


def _follow(
    api: ApiClient,
    params: dict[str, Any],
    found: list[dict[str, Any]],
    *,
    long: bool,
    as_json: bool,
) -> None:
    told: dict[tuple[int, bool], None] = {}
    while True:
        for event in found:
            key = (event["id"], event["cleared_ns"] is not None)
            if key in told:
                continue
            told[key] = None
            if as_json:
                print_json(event)
            else:
                _tell(event, long=long)
        while len(told) > TOLD_MAX:
            del told[next(iter(told))]
        newest_ns = max((_changed_ns(event) for event in found), default=0)
        time.sleep(POLL_SECONDS)
        # By the config server's clock, as its events tell it; ours may differ.
        since_ns = max(0, newest_ns - OVERLAP_SECONDS * 10**9)
        try:
            found = api.items("/events", {**params, "since_ns": since_ns})[::-1] or found
        except (UnavailableError, LimitError):
            continue


def _changed_ns(event: dict[str, Any]) -> int:
    return int(event["cleared_ns"] or event["at_ns"])


def _tell(event: dict[str, Any], *, long: bool) -> None:
    over = event["cleared_ns"]
    mark = "over    " if over else f"{event['severity']:8}"
    print_line(
        f"{instant(over or event['at_ns'])}  {mark}  {event['source']}: {event['message']}",
        style="green" if over else state_style(event["severity"]),
    )
    if long and not over:
        print_line(f"    cause   {event['cause']}")
        print_line(f"    action  {event['action']}")
