"""``understudy audit``: who changed what, and who was refused."""

from typing import Annotated

import typer

from appliance.cli.api_client import connect
from appliance.cli.output import AsJson, Column, instant, print_json, print_rows

LISTED_DEFAULT = 50


def audit(
    *,
    count: Annotated[int, typer.Option("-n", help="How many at most.", min=1)] = LISTED_DEFAULT,
    as_json: AsJson = False,
) -> None:
    """List the newest changes and refusals: who, when, from where, and what came of it."""
    with connect() as api:
        found = api.items("/audit", count_max=count)[::-1]
    if as_json:
        print_json(found)
        return
    print_rows(
        found,
        (
            Column("at", "at_ns", instant),
            Column("who", "who"),
            Column("from", "source"),
            Column("did", "action"),
            Column("to", "target", wraps=True),
            Column("outcome", "outcome", style=_style),
        ),
        as_json=False,
        none="Nothing was changed yet.",
    )


def _style(outcome: str) -> str:
    return "" if outcome == "done" else "yellow"
