"""The state machine as a page with a picture, drawn from the table.

``python -m appliance.config_server.protection.picture docs/PROTECTION.md`` writes it.
"""

import sys

from appliance.config_server.protection.table import TABLE, Command, Event, State
from daemon.durable import write_whole

_QUIET = {Event.AGENT_LOST, Event.AGENT_FOUND}
"""Events that change nothing anywhere; drawing them would hide the others."""

_ORIGIN = (
    "Made from `appliance/config_server/protection/table.py` by "
    "`python -m appliance.config_server.protection.picture docs/PROTECTION.md`; do not edit."
)


def draw() -> str:
    """The page, in Markdown with a Mermaid diagram."""
    lines = [
        "# Protection",
        "",
        _ORIGIN,
        "",
        "```mermaid",
        "stateDiagram-v2",
        f"    [*] --> {_node(State.UNPROTECTED)}",
    ]
    lines += [f'    state "{state}" as {_node(state)}' for state in State]
    for state, row in TABLE.items():
        targets: dict[State, list[str]] = {}
        for event, (target, commands) in row.items():
            if event not in _QUIET:
                job = " (job)" if Command.START_JOB in commands else ""
                targets.setdefault(target, []).append(f"{event}{job}")
        lines += [
            f"    {_node(state)} --> {_node(target)}: {', '.join(events)}"
            for target, events in targets.items()
        ]
    lines += [
        "```",
        "",
        "*(job)*: a durable job does it. What is not in this table is refused as a conflict.",
        "",
        "| state | event | becomes | follows |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {state} | {event} | {target} | {', '.join(commands) or '-'} |"
        for state, row in TABLE.items()
        for event, (target, commands) in row.items()
    ]
    return "\n".join(lines) + "\n"


def _node(state: State) -> str:
    return state.value.replace("-", "_")


if __name__ == "__main__":
    write_whole(sys.argv[1], draw().encode(), mode=0o644)
