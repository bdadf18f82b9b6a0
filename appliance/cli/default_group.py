"""A noun whose list needs no word of its own: ``jobs``, ``jobs ID``, and ``jobs resume ID``."""

from typing import Any

from typer.core import TyperGroup

DEFAULT = "list"


class DefaultGroup(TyperGroup):
    """What is no command of the group is an argument of `DEFAULT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)
