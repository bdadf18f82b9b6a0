"""``make bench``: measure every figure and print one table.

Exit code 0 whether targets are met or not; 1, with the reason, when a benchmark cannot run.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from replication.errors import ReplicationError
from tests.bench.figure import Row, ShareOfLimit, shown
from tests.bench.place import place
from tests.bench.suite import BENCHMARKS

PAPER_WIDTH = 150
"""Characters a line where nobody's terminal says how many there are."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=[*BENCHMARKS], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work at all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--folder", help="work below this folder, not in the temporary one")
    parser.add_argument("--rest", type=float, default=1.0, help="seconds of rest between runs")
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # clean up, as after an interrupt
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PAPER_WIDTH
    if options.list:
        for name, benchmark in BENCHMARKS.items():
            console.print(f"{name:10} {(benchmark.__doc__ or '').splitlines()[0]}")
        return 0
    rows: dict[str, list[Row]] = {}
    failures: dict[str, str] = {}
    for name in options.only or BENCHMARKS:
        console.print(f"[dim]{name} …[/dim]")
        try:
            with place(options.folder, quick=options.quick, rest=options.rest) as where:
                rows[name] = BENCHMARKS[name](where)
        except (ReplicationError, AssertionError, OSError) as error:
            failures[name] = str(error) or type(error).__name__
        except BaseExceptionGroup as errors:
            failures[name] = f"{errors.exceptions[0]!r}"
        for row in rows.get(name, []):
            console.print(f"  {row.figure}: {shown(row.measured)} {row.unit}")
    _show(console, [row for found in rows.values() for row in found])
    if options.json:
        tree = {name: [row.as_json() for row in found] for name, found in rows.items()}
        options.json.write_text(json.dumps({"rows": tree, "failures": failures}, indent=2) + "\n")
    for name, reason in failures.items():
        console.print(f"[red]{name} could not run:[/red] {reason}")
    return 1 if failures else 0


def _show(console: Console, rows: Sequence[Row]) -> None:
    """One table, and below it what each line was held against."""
    table = Table()
    for heading in ("figure", "target", "measured", "limit", "ratio", "met"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for row in rows:
        of_limit = isinstance(row.target, ShareOfLimit)
        table.add_row(
            row.figure,
            row.target.told() if of_limit else f"{row.target.told()} {row.unit}",
            f"{shown(row.measured)} {row.unit}",
            f"{shown(row.limit)} {row.unit}" if row.limit is not None else "",
            f"{row.ratio:.2f}" if row.ratio is not None else "",
            "[green]yes[/green]" if row.is_met else "[red]no[/red]",
        )
    console.print(table)
    for row in rows:
        limit = f"limit: {row.limit_is}" if row.limit_is else ""
        told = "; ".join(part for part in (limit, row.note) if part)
        if told:
            console.print(f"[dim]  {row.figure}: {told}[/dim]")


if __name__ == "__main__":
    sys.exit(main())
