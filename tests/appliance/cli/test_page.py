"""docs/CLI.md against the commands, and help that names them all."""

import re
from pathlib import Path

import pytest
import typer

from appliance.cli.__main__ import app
from appliance.cli.commands import TABLE, Entry

PAGE = (Path(__file__).parents[3] / "docs" / "CLI.md").read_text()
COMMANDS = typer.main.get_command(app)


def rows() -> dict[str, str]:
    """Lines of the table of commands, by the names they begin with."""
    text = PAGE.split("## Commands\n", 1)[1].split("\n## ", 1)[0]
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            for name in re.findall(r"`([a-z]+)[^`]*`", line.split(" | ")[0]):
                found[name] = found.get(name, "") + line
    return found


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_each_command_loads_says_what_it_does_and_is_on_the_page(entry: Entry) -> None:
    command = COMMANDS.get_command(None, entry.name)  # type: ignore[attr-defined]
    assert command.help
    line = rows()[entry.name]
    if hasattr(command, "commands") and entry.panel != "By hand":
        assert [verb for verb in command.commands if verb not in line] == []


def test_options_that_print_json_are_everywhere() -> None:
    """Everything that prints can print JSON."""
    silent = {"mount", "lab"}
    for entry in TABLE:
        command = COMMANDS.get_command(None, entry.name)  # type: ignore[attr-defined]
        for one in getattr(command, "commands", {entry.name: command}).values():
            options = {option for parameter in one.params for option in parameter.opts}
            assert "--json" in options or entry.name in silent, (entry.name, one.name)
