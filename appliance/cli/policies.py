"""``understudy policies``: what is kept of a machine, how often, and when a resync may begin."""

from typing import Annotated, Any

import typer

from appliance.cli.api_client import connect, part
from appliance.cli.names import PolicyName, parse_duration
from appliance.cli.output import (
    AsJson,
    Column,
    instant,
    print_json,
    print_line,
    print_pairs,
    print_rows,
    span,
)
from replication.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True, help="Replication policies: RPO threshold, retention, points, resync."
)

RpoThreshold = Annotated[
    str | None, typer.Option(metavar="SPAN", help="RPO above it is an event; 15m by default.")
]
Retention = Annotated[
    str | None, typer.Option(metavar="SPAN", help="Points are kept so long; 24h, up to 15d.")
]
AppFrequency = Annotated[
    str | None, typer.Option(metavar="SPAN", help="App-consistent points: off, or 1h to 12h.")
]
CrashFrequency = Annotated[
    str | None, typer.Option(metavar="SPAN", help="Fixed at 5m; labs may be set otherwise.")
]
ResyncWindow = Annotated[
    str | None, typer.Option(metavar="HH:MM-HH:MM", help="In UTC; always: at any time.")
]


@app.command("list")
def list_policies(*, as_json: AsJson = False) -> None:
    """List the policies."""
    with connect() as api:
        found = api.items("/policies")
    if as_json:
        print_json(found)
        return
    print_rows(
        found,
        (
            Column("policy", "name"),
            Column("kind", "kind"),
            Column("RPO threshold", "rpo_threshold_seconds", span, right=True),
            Column("retention", "retention_seconds", span, right=True),
            Column("crash every", "crash_frequency_seconds", span, right=True),
            Column("app every", "app_frequency_seconds", _frequency, right=True),
            Column("resync window", "resync_window"),
        ),
        as_json=False,
        none="There are no policies; make one: understudy policies create NAME",
    )


@app.command()
def show(policy: PolicyName, *, as_json: AsJson = False) -> None:
    """Show one policy."""
    with connect() as api:
        _tell(api.get(f"/policies/{part(policy)}"), as_json=as_json)


@app.command()
def create(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="Its name.")],
    *,
    rpo_threshold: RpoThreshold = None,
    retention: Retention = None,
    app_frequency: AppFrequency = None,
    crash_frequency: CrashFrequency = None,
    resync_window: ResyncWindow = None,
    as_json: AsJson = False,
) -> None:
    """Make a policy; its failback policy is made along with it."""
    changes = _changes(rpo_threshold, retention, app_frequency, crash_frequency, resync_window)
    with connect() as api:
        _tell(api.post("/policies", {"name": policy, **changes}), as_json=as_json)


@app.command()
def edit(
    policy: PolicyName,
    *,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="A new name.")] = None,
    rpo_threshold: RpoThreshold = None,
    retention: Retention = None,
    app_frequency: AppFrequency = None,
    crash_frequency: CrashFrequency = None,
    resync_window: ResyncWindow = None,
    as_json: AsJson = False,
) -> None:
    """Change a policy, also while machines use it."""
    changes = _changes(rpo_threshold, retention, app_frequency, crash_frequency, resync_window)
    if name is not None:
        changes["name"] = name
    if not changes:
        raise ConfigError("nothing is to be changed", hint="see `understudy policies edit --help`")
    with connect() as api:
        # The revision of now: a change that somebody else makes meanwhile is not overwritten.
        changes["revision"] = api.get(f"/policies/{part(policy)}")["revision"]
        _tell(api.patch(f"/policies/{part(policy)}", changes), as_json=as_json)


@app.command()
def delete(policy: PolicyName, *, as_json: AsJson = False) -> None:
    """Delete a policy that no machine uses."""
    with connect() as api:
        api.delete(f"/policies/{part(policy)}")
    if as_json:
        print_json({"name": policy, "deleted": True})
    else:
        print_line(f"{policy}: deleted.")


def _changes(
    rpo_threshold: str | None,
    retention: str | None,
    app_frequency: str | None,
    crash_frequency: str | None,
    resync_window: str | None,
) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for key, option, text in (
        ("rpo_threshold_seconds", "--rpo-threshold", rpo_threshold),
        ("retention_seconds", "--retention", retention),
        ("app_frequency_seconds", "--app-frequency", app_frequency),
        ("crash_frequency_seconds", "--crash-frequency", crash_frequency),
    ):
        if text is not None:
            changes[key] = parse_duration(text, option)
    if resync_window is not None:
        changes["resync_window"] = resync_window
    return changes


def _tell(policy: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(policy)
        return
    print_pairs(
        [
            ("policy", policy["name"]),
            ("kind", policy["kind"]),
            ("RPO threshold", span(policy["rpo_threshold_seconds"])),
            ("retention", span(policy["retention_seconds"])),
            ("crash-consistent", f"every {span(policy['crash_frequency_seconds'])}"),
            ("app-consistent", _frequency(policy["app_frequency_seconds"])),
            ("resync window", policy["resync_window"]),
            ("made", instant(policy["created_ns"])),
        ]
    )


def _frequency(seconds: int) -> str:
    return span(seconds) if seconds else "off"
