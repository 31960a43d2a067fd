"""What commands print: tables that fit a terminal or a file, JSON for programs, the verdict of a run."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from sekron_search.cli.arguments import BUDGET_MISSED

#: Their file descriptors.
STDOUT, STDERR = 1, 2

#: How costs are printed.
FORMATS = {
    "flops": "{:,.0f}",
    "params": "{:,.0f}",
    "latency_ms": "{:.3f}",
    "peak_activation_bytes": "{:,.0f}",
}


def cost_text(name: str, value: float | None) -> str:
    """A cost as text; empty if it is not known."""
    return "" if value is None else FORMATS[name].format(value)


def number(value: float | None, form: str = "{:.4f}") -> str:
    """A number as text; empty if there is none."""
    return "" if value is None else form.format(value)


@contextlib.contextmanager
def json_alone(wanted: bool) -> Iterator[None]:
    """Whatever is printed inside, by a user's own code too, goes to standard error, if JSON alone is wanted."""
    if not wanted:
        yield
        return
    out = sys.stdout
    out.flush()
    kept = os.dup(STDOUT)
    try:
        os.dup2(STDERR, STDOUT)  # what other processes and libraries in C print
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        out.flush()
        os.dup2(kept, STDOUT)
        os.close(kept)


def print_json(data: Mapping[str, Any]) -> None:
    """One object, on standard output."""
    print(json.dumps(data, indent=1, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[str] = ()) -> None:
    """A table: boxed and as wide as the terminal on one; else plain columns that nothing cuts or wraps.

    Args:
        columns: Their heads.
        rows: Their cells; what does not print is replaced.
        left: Columns of text; the others are numbers, and end at the right.
    """
    cells = [[_printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(columns, cells, left)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in (columns, *cells):
        aligned = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        )
        print("  ".join(aligned).rstrip())


def _rich_table(columns: Sequence[str], cells: Sequence[Sequence[str]], left: Collection[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console().print(table)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def verdict_json(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a finished run says, for programs; everything else is in its report.json."""
    from sekron_search.catalog import outcome

    return {
        "run": str(folder),
        "report": str(folder / "report.json"),
        "network": str(folder / "compressed"),
        **outcome(report),
        "layers": [
            {key: layer[key] for key in ("name", "structure", "family", "execution")} for layer in report["layers"]
        ],
    }


def conclude(report: Mapping[str, Any], folder: Path, *, as_json: bool) -> None:
    """Print the verdict, and end the command with the exit code that says whether every budget is met."""
    from sekron_search.report.verdict import summary

    if as_json:
        print_json(verdict_json(report, folder))
    else:
        for line in summary(dict(report)):
            print(line)
        print(f"report: {folder / 'report.html'} (the same as Markdown: report.md)")
        print(f"network: {folder / 'compressed'} (open it with sekron_search.load({str(folder)!r}))")
    if not all(budget["met"] for budget in report["budgets"]):
        raise typer.Exit(BUDGET_MISSED)
