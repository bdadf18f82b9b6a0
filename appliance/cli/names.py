"""What several commands take: arguments with completion, durations."""

import re
import uuid
from typing import Annotated, Any

import typer

from appliance.cli.api_client import ApiClient
from appliance.cli.sign_in import find_sign_in
from replication.errors import ConfigError

COMPLETION_SECONDS_MAX = 2.0
COMPLETIONS_MAX = 200
_UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def _complete(path: str, incomplete: str) -> list[str]:
    """Names that begin so; none at all where the config server cannot be asked quickly."""
    try:
        sign_in = find_sign_in()
        if sign_in is None or not sign_in.token:
            return []
        with ApiClient(sign_in, timeout_seconds=COMPLETION_SECONDS_MAX) as api:
            items: list[dict[str, Any]] = api.items(path, count_max=COMPLETIONS_MAX)
        names = [str(item["name"]) for item in items]
    except Exception:  # noqa: BLE001 - a shell that completes wants names or nothing
        return []
    return sorted(name for name in names if name.startswith(incomplete))


def complete_machine(incomplete: str) -> list[str]:
    return _complete("/machines", incomplete)


def complete_policy(incomplete: str) -> list[str]:
    return _complete("/policies", incomplete)


def complete_vcenter(incomplete: str) -> list[str]:
    return _complete("/vcenters", incomplete)


def complete_plan(incomplete: str) -> list[str]:
    return _complete("/plans", incomplete)


def complete_schedule(incomplete: str) -> list[str]:
    return _complete("/drill-schedules", incomplete)


STORE_VARIABLE = "UNDERSTUDY_STORE"
STORES_LOOKED_FOR = ("/var/lib/understudy/store", "/var/lib/understudy-lab/store")

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar=STORE_VARIABLE,
        metavar="DIR",
        help="The applier's store; the first of "
        + " and ".join(STORES_LOOKED_FOR)
        + " that is there, if not given.",
    ),
]
MachineName = Annotated[
    str,
    typer.Argument(metavar="MACHINE", help="Name or id.", autocompletion=complete_machine),
]
PolicyName = Annotated[
    str, typer.Argument(metavar="POLICY", help="Its name.", autocompletion=complete_policy)
]
VCenterName = Annotated[
    str, typer.Argument(metavar="NAME", help="Name or id.", autocompletion=complete_vcenter)
]


PlanName = Annotated[
    str, typer.Argument(metavar="PLAN", help="Its name.", autocompletion=complete_plan)
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Wait = Annotated[bool, typer.Option("--wait", help="Show how it goes until it is done.")]


def is_id(text: str) -> bool:
    """Whether it is written as the ids of failovers, runs and drills are."""
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def parse_duration(text: str, option: str) -> int:
    """Seconds of ``90``, ``90s``, ``15m``, ``24h``, ``3d``; ``off`` is 0."""
    if text.strip().lower() == "off":
        return 0
    found = re.fullmatch(r"\s*(\d{1,9})\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(
            f"{option}: {text!r:.40} is no duration", hint="as in 90s, 15m, 24h, 3d, off"
        )
    return int(found[1]) * _UNITS[found[2]]
