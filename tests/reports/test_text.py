"""Tables and numbers as text."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from vitprune.reports.text import count, markdown_table, percent, rich_table, storage


@pytest.mark.parametrize(
    ("macs", "text"),
    [
        (1.254e10, "12.5 G"),
        (4.6e6, "4.6 M"),
        (1234.0, "1.23 k"),
        (999.4, "999"),
        (0.0, "0"),
        (999.7e6, "1 G"),
        (1.35e12, "1.35 T"),
        (999.7e12, "1,000 T"),
        (2.5e15, "2,500 T"),
    ],
)
def test_macs_have_three_figures(macs: float, text: str) -> None:
    assert count(macs) == text


@pytest.mark.parametrize(("size", "text"), [(17, "17 bytes"), (86.6e6, "86.6 MB"), (1.234e10, "12.3 GB")])
def test_files_have_a_unit(size: float, text: str) -> None:
    assert storage(size) == text


def test_fractions_are_percentages() -> None:
    assert percent(0.6514) == "65.1 %"
    assert percent(0.6514, 2) == "65.14 %"


def test_markdown() -> None:
    assert markdown_table([("", "a"), ("b", "1")]) == "|  | a |\n| --- | ---: |\n| b | 1 |"


def test_what_looks_like_markup_is_text() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(rich_table("[bold]title", [("", "[red]a"), ("[b]", "[i]1")]))
    assert isinstance(console.file, StringIO)
    for text in ("[bold]title", "[red]a", "[b]", "[i]1"):
        assert text in console.file.getvalue()
