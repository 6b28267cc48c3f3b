"""Tables as rows of text, for the terminal and for Markdown, and numbers as text."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

Cells = list[tuple[str, ...]]
"""A table's header and rows."""


def rich_table(title: str, cells: Cells) -> Table:
    """For the terminal; numbers, which are all but the first column, to the right."""
    table = Table(title=escape(title), title_justify="left")
    for index, heading in enumerate(cells[0]):
        table.add_column(escape(heading), justify="left" if index == 0 else "right")
    for row in cells[1:]:
        table.add_row(*map(escape, row))
    return table


def markdown_table(cells: Cells) -> str:
    """The same in Markdown."""
    rule = ("---", *("---:" for _ in cells[0][1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))


def percent(part: float, digits: int = 1) -> str:
    """A fraction as a percentage."""
    return f"{100 * part:.{digits}f} %"


def count(macs: float) -> str:
    """Multiply-accumulates, to three figures."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if macs >= size:
            return f"{macs / size:.3g} {unit}"
    return f"{macs:.0f}"


def number(value: float) -> str:
    """Any number, to four figures."""
    return f"{value:.4g}"
