"""Tables as rows of text, for the terminal and for Markdown, and numbers as text."""

from __future__ import annotations

from collections.abc import Sequence

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


def asked_for(part: float) -> str:
    """A budget as a percentage, with as many digits as it was given."""
    return f"{100 * part:g} %"


def count(macs: float) -> str:
    """Multiply-accumulates, to three figures."""
    return _scaled(macs, ("", "k", "M", "G", "T"))


def storage(size: float) -> str:
    """Bytes, to three figures."""
    return _scaled(size, ("bytes", "kB", "MB", "GB", "TB"))


def _scaled(value: float, units: Sequence[str]) -> str:
    """In the first unit in which it has no fourth figure; each is a thousand of the one before."""
    for unit in units[:-1]:
        if float(text := f"{value:.3g}") < 1000:
            return f"{text} {unit}".rstrip()
        value /= 1000
    return f"{float(f'{value:.3g}'):,.4g} {units[-1]}" if value < 1000 else f"{value:,.0f} {units[-1]}"


def number(value: float) -> str:
    """Any number, to four figures."""
    return f"{value:.4g}"
