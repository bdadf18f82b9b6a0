"""How commands print: tables for people, JSON for programs, progress where it lasts."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 200

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its heading, the key of its value in a row, how people read it."""

    heading: str
    key: str
    show: Callable[[Any], str] = str
    right: bool = False
    wraps: bool = False


def print_json(tree: object) -> None:
    sys.stdout.write(json.dumps(tree, indent=2) + "\n")


def print_rows(
    rows: Sequence[dict[str, Any]], columns: Sequence[Column], *, as_json: bool, none: str
) -> None:
    """Print rows; ``none`` is what to say when there are none."""
    if as_json:
        print_json(list(rows))
        return
    # A pipe has no width: lines stay whole there, for grep and for logs.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    if not rows:
        console.print(_plain(none))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.heading,
            justify="right" if column.right else "left",
            no_wrap=not column.wraps,
        )
    for row in rows:
        table.add_row(*(_plain(column.show(row[column.key])) for column in columns))
    console.print(table)


def _plain(text: str) -> Text:
    """As it is: no markup, and nothing that a terminal would obey. Names and reasons come from
    machines that others may own.
    """
    return Text(printable(text))


def printable(text: str) -> str:
    """``text`` with a question mark for whatever does not print."""
    return "".join(char if char.isprintable() else "?" for char in text)


def mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):,.1f} MiB"


def instant(time_ns: int | None) -> str:
    """A time in UTC to the second; a dash where there is none."""
    if not time_ns:
        return "-"
    return f"{datetime.fromtimestamp(time_ns / 1e9, UTC):%Y-%m-%d %H:%M:%SZ}"


def seconds_ago(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:,.1f} s"


@contextlib.contextmanager
def progress_bytes(what: str, total_bytes: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; yields a function that is told the bytes done so far."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task(what, total=total_bytes)
        yield lambda done: progress.update(task, completed=done)
