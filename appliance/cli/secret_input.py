"""Secrets come from a file, standard input or a prompt, never from an argument: those are in the
process list and in the shell's history.
"""

import sys

import typer

from appliance.cli.sign_in import told_unread
from replication.errors import ConfigError

SECRET_CHARS_MAX = 4096


def read_secret(what: str, *, file: str | None, from_stdin: bool) -> str:
    """The first line of the file or of standard input; a prompt where neither is named."""
    if file and from_stdin:
        raise ConfigError(f"the {what} comes from a file or from standard input, not from both")
    if file:
        secret = _from_file(what, file)
    elif from_stdin:
        secret = sys.stdin.readline(SECRET_CHARS_MAX)
    elif sys.stdin.isatty():
        secret = typer.prompt(what.capitalize(), hide_input=True, err=True)
    else:
        option = what.rsplit(maxsplit=1)[-1]
        raise ConfigError(
            f"cannot ask for the {what}: this is not a terminal",
            hint=f"give --{option}-stdin or --{option}-file FILE",
        )
    secret = secret.strip("\r\n")
    if not secret:
        raise ConfigError(f"the {what} is empty")
    return secret


def _from_file(what: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline(SECRET_CHARS_MAX)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the {what} from {path}: {told_unread(error)}") from error
