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

from appliance.cli.sign_in import told_unread
from replication.errors import ConfigError

PIPE_WIDTH = 200

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its heading, the key of its value in a row, how people read it.

    style: the colour of a value.
    """

    heading: str
    key: str
    show: Callable[[Any], str] = str
    right: bool = False
    wraps: bool = False
    style: Callable[[Any], str] | None = None


def print_json(tree: object) -> None:
    sys.stdout.write(json.dumps(tree, indent=2) + "\n")


def print_rows(
    rows: Sequence[dict[str, Any]], columns: Sequence[Column], *, as_json: bool, none: str
) -> None:
    """Print rows; ``none`` is what to say when there are none."""
    if as_json:
        print_json(list(rows))
        return
    console = _console()
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
        table.add_row(*(_cell(column, row.get(column.key)) for column in columns))
    console.print(table)


def _cell(column: Column, value: Any) -> Text:
    text = _plain(column.show(value))
    if column.style is not None:
        text.stylize(column.style(value))
    return text


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """What is known of one thing: a line each."""
    console = _console()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, value in pairs:
        table.add_row(heading, _plain(value))
    console.print(table)


def print_line(text: str, *, style: str = "") -> None:
    """One line to standard output, as plain text."""
    _console().print(Text(printable(text), style=style), soft_wrap=True)


def _console() -> Console:
    # A pipe has no width: lines stay whole there, for grep and for logs.
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _plain(text: str) -> Text:
    """As it is: no markup, and nothing that a terminal would obey. Names and reasons come from
    machines that others may own.
    """
    return Text(printable(text))


def printable(text: str) -> str:
    """``text`` with a question mark for whatever does not print."""
    return "".join(char if char.isprintable() else "?" for char in text)


STATE_STYLES = {
    "normal": "green",
    "warning": "yellow",
    "critical": "bold red",
    "protected": "green",
    "succeeded": "green",
    "running": "cyan",
    "failed": "bold red",
    "cancelled": "yellow",
    "resync-required": "yellow",
    "connected": "green",
    "connecting": "cyan",
    "unreachable": "yellow",
    "refused": "bold red",
    "passed": "green",
    "up": "green",
    "committed": "green",
    "starting": "cyan",
    "cleaning-up": "cyan",
    "cancelling": "cyan",
    "waiting": "yellow",
}


def state_style(state: Any) -> str:
    """The colour of a state, a severity, a job's state."""
    return STATE_STYLES.get(str(state), "")


def text_or_dash(value: Any) -> str:
    return "-" if value is None or value == "" else str(value)


def first_line(text: Any) -> str:
    """Of a text that may have several, or be absent."""
    return str(text or "").split("\n", 1)[0]


def counted(count: int, noun: str) -> str:
    """``1 disk``, ``2 disks``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def size(size_bytes: int | None) -> str:
    """In the unit that suits: ``512 B``, ``4.0 GiB``."""
    if size_bytes is None:
        return "-"
    amount, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.0f} B" if units[0] == "B" else f"{amount:,.1f} {units[0]}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.0f} %"


_SPANS = (("d", 86400), ("h", 3600), ("min", 60))


def span(seconds: float | None) -> str:
    """How long: ``8 s``, ``5 min``, ``2 h 5 min``, ``3 d 4 h``."""
    if seconds is None:
        return "-"
    rest, told = max(0, round(seconds)), []
    if rest < 120:
        return f"{rest} s"
    for unit, length in _SPANS:
        if rest >= length:
            told.append(f"{rest // length} {unit}")
            rest %= length
        elif told:
            break
    return " ".join(told[:2])


def mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):,.1f} MiB"


def instant(time_ns: int | None) -> str:
    """A time in UTC to the second; a dash where there is none."""
    if not time_ns:
        return "-"
    return f"{datetime.fromtimestamp(time_ns / 1e9, UTC):%Y-%m-%d %H:%M:%SZ}"


def seconds_ago(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:,.1f} s"


def write_file(path: str, content: bytes) -> None:
    """Raises ConfigError where it cannot be written."""
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def read_file(path: str) -> str:
    """A text, of standard input for ``-``. Raises ConfigError where it cannot be read."""
    try:
        if path == "-":
            return sys.stdin.read()
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {told_unread(error)}") from error


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
