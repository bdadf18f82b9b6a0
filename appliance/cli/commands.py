"""All commands in one table. A command's module is loaded when it is used: those that read a store
bring numpy and FUSE with them, and a shell that completes should not wait for these.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperGroup

SIGN_IN = "Sign in"
PROTECT = "Discover and protect"
WATCH = "Watch"
RECOVER = "Recover"
POINTS = "Recovery points, on the applier's host"
ADMINISTER = "Who may do what"
BY_HAND = "By hand"


@dataclass(frozen=True, slots=True)
class Entry:
    """A command or a group of commands: an attribute of a module of this package."""

    panel: str
    name: str
    module: str
    attribute: str
    passes_on: bool = False


TABLE = (
    Entry(SIGN_IN, "login", "login", "login"),
    Entry(SIGN_IN, "logout", "login", "logout"),
    Entry(PROTECT, "vcenters", "vcenters", "app"),
    Entry(PROTECT, "policies", "policies", "app"),
    Entry(PROTECT, "protect", "protect", "protect"),
    Entry(PROTECT, "unprotect", "protect", "unprotect"),
    Entry(PROTECT, "disks", "disks", "app"),
    Entry(PROTECT, "resync", "resync", "resync"),
    Entry(PROTECT, "jobs", "jobs", "app"),
    Entry(RECOVER, "points", "points", "app"),
    Entry(RECOVER, "failover", "failover", "app"),
    Entry(RECOVER, "plans", "plans", "app"),
    Entry(RECOVER, "drills", "drills", "app"),
    Entry(RECOVER, "vms", "vms", "app"),
    Entry(WATCH, "health", "health", "health"),
    Entry(WATCH, "machines", "machines", "machines"),
    Entry(WATCH, "events", "events", "events"),
    Entry(WATCH, "components", "components", "components"),
    Entry(POINTS, "mount", "mount", "mount"),
    Entry(POINTS, "export", "export", "export"),
    Entry(POINTS, "verify", "verify", "verify"),
    Entry(ADMINISTER, "tokens", "tokens", "app"),
    Entry(ADMINISTER, "certificates", "certificates", "app"),
    Entry(ADMINISTER, "audit", "audit", "audit"),
    Entry(BY_HAND, "pki", "pki", "app"),
    Entry(BY_HAND, "agent", "agent", "app"),
    Entry(BY_HAND, "lab", "lab", "lab", passes_on=True),
)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


class Commands(TyperGroup):
    """The table as a group of commands."""

    # Typer brings a click of its own, whose types have no public name.
    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return [entry.name for entry in TABLE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        entry = next((entry for entry in TABLE if entry.name == cmd_name), None)
        return _load(entry) if entry else None


def _load(entry: Entry) -> Any:
    module = importlib.import_module(f"{__package__}.{entry.module}")
    found: Any = getattr(module, entry.attribute)
    if not isinstance(found, typer.Typer):
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        settings = _PASS_ON if entry.passes_on else None
        single.command(entry.name, context_settings=settings)(found)
        found = single
    else:
        found.rich_markup_mode = "rich"
    # Completion is an option of the whole, not of each of its parts.
    found._add_completion = False  # noqa: SLF001 - typer has no other way after creation
    command: Any = typer.main.get_command(found)
    command.name = entry.name
    command.rich_help_panel = entry.panel
    return command
