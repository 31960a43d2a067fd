"""The parts that a report is made of, whatever it is written as; and their Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: Its header.
        kind: Numbers are aligned to the right; code is set as such.
    """

    title: str
    kind: Literal["text", "number", "code"] = "number"


@dataclass(frozen=True)
class Table:
    """A table of plain text.

    Args:
        columns: From left to right.
        rows: A cell per column.
        chosen: The row that is marked, if one is.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    chosen: int | None = None


@dataclass(frozen=True)
class Picture:
    """A plot by its name; `alt` says what it shows."""

    name: str
    alt: str


@dataclass(frozen=True)
class Items:
    """A list of short texts."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Lines to be typed, in a language of fenced blocks."""

    text: str
    language: Literal["bash", "python"]


#: Plain strings are paragraphs.
Block = str | Table | Picture | Items | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]

    def markdown(self) -> str:
        """The section as Markdown."""
        return "\n\n".join([f"## {self.title}", *(_markdown(block) for block in self.blocks)])


def escape(text: str) -> str:
    """Text with nothing in it that Markdown takes for HTML, on one line."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").splitlines())


def _markdown(block: Block) -> str:
    match block:
        case Table():
            return _table(block)
        case Picture():
            return f"![{escape(block.alt)}](plots/{block.name}.png)"
        case Items():
            return "\n".join(f"- {escape(text)}" for text in block.texts)
        case Code():
            return f"```{block.language}\n{block.text}\n```"
        case str():
            return escape(block)


def _table(table: Table) -> str:
    rules = {"text": "---", "number": "---:", "code": "---"}
    titles = [_cell(column.title, Column("", "text")) for column in table.columns]
    lines = [_row(titles), _row([rules[column.kind] for column in table.columns])]
    for number, row in enumerate(table.rows):
        cells = [_cell(text, column) for text, column in zip(row, table.columns, strict=True)]
        if number == table.chosen:
            cells[0] += " **chosen**"
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str, column: Column) -> str:
    shown = escape(text).replace("|", "\\|")
    return f"`{shown}`" if column.kind == "code" and shown else shown
