"""``understudy health``: whether all is well, and what is not."""

from typing import Annotated, Any

import typer

from appliance.cli.api_client import connect, part
from appliance.cli.names import complete_machine
from appliance.cli.output import AsJson, print_json, print_line, span, state_style

EXIT_CODES = {"normal": 0, "warning": 20, "critical": 21}
"""None of the classes of errors has one of these: an unwell fleet is no failed question."""


def health(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A machine or component, by name or id.",
            autocompletion=complete_machine,
        ),
    ] = None,
    *,
    exit_code: Annotated[
        bool,
        typer.Option(
            "--exit-code",
            help=f"End with exit code {EXIT_CODES['warning']} where it is a warning, "
            f"{EXIT_CODES['critical']} where it is critical, else 0.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell whether all is well, and of what is not: why, and what to do."""
    with connect() as api:
        found = api.get("/health" if name is None else f"/health/{part(name)}")
    if as_json:
        print_json(found)
    elif name is not None:
        _tell(found)
    else:
        _tell_all(found)
    state = found["state"] if name is None else found["health"]["state"]
    if exit_code and EXIT_CODES[state]:
        raise typer.Exit(EXIT_CODES[state])


def _tell_all(found: dict[str, Any]) -> None:
    print_line(found["state"].upper(), style=state_style(found["state"]))
    print_line(f"machines    {_counts(found['machines'])}")
    print_line(f"components  {_counts(found['components'])}")
    for source in found["unwell"]:
        print_line("")
        _tell(source)
    more = found["unwell_count"] - len(found["unwell"])
    if more > 0:
        print_line(f"\nand {more} more that are not normal")


def _counts(counts: dict[str, int]) -> str:
    told = [f"{counts[state]} {state}" for state in EXIT_CODES if counts[state]]
    return ", ".join(told) or "none"


def _tell(source: dict[str, Any]) -> None:
    state = source["health"]["state"]
    rpo = ""
    if source["rpo_durable_seconds"] is not None:
        rpo = f"  RPO {span(source['rpo_durable_seconds'])} durable"
        if source["rpo_restorable_seconds"] is not None:
            rpo += f", {span(source['rpo_restorable_seconds'])} restorable"
    print_line(f"{source['name']} ({source['kind']}): {state}{rpo}", style=state_style(state))
    for reason in source["health"]["reasons"]:
        print_line(f"  {reason['severity']}: {reason['message']}  [{reason['code']}]")
        print_line(f"    cause   {reason['cause']}", style="dim")
        print_line(f"    action  {reason['action']}", style="dim")
