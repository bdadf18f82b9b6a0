"""``understudy lab``: hands over to the lab, a program of its own beside the product."""

import os
import sys

import typer

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def lab(context: typer.Context) -> None:
    """Run the lab on this machine: `up`, `down`, `status` (see `understudy lab up --help`)."""
    command = [sys.executable, "-m", "deploy.lab", *context.args]
    os.execv(sys.executable, command)  # noqa: S606 - our own module, no shell


def register(app: typer.Typer) -> None:
    """Add the command; its arguments are the lab's own."""
    app.command(context_settings=_PASS_ON)(lab)
