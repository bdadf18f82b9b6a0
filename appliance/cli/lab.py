"""``understudy lab``: hands over to the lab, a program of its own beside the product."""

import os
import sys

import typer


def lab(context: typer.Context) -> None:
    """Rehearse on this machine: `up`, `vm`, `down`, `status`."""
    command = [sys.executable, "-m", "deploy.lab", *context.args]
    os.execv(sys.executable, command)  # noqa: S606 - our own module, no shell
