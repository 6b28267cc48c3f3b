"""Writes the table of rooms in CONTRIBUTING.md: floors from pyproject.toml, and what each room's `__init__` says of it.

python docs/rooms.py
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- rooms: written by docs/rooms.py -->\n", "<!-- end of rooms -->"


def floors() -> list[list[str]]:
    """The rooms of each floor, from the top down, as import-linter checks them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = project["tool"]["importlinter"]["contracts"][0]
    return [layer.split(" | ") for layer in contract["layers"]]


def said_of(room: str) -> str:
    """First paragraph of a room's docstring, in one line."""
    path = ROOT / "vitprune" / room / "__init__.py"
    path = path if path.exists() else ROOT / "vitprune" / f"{room}.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text, f"{path} says nothing of itself"
    return re.sub(r"\s+", " ", text.split("\n\n")[0])


def table() -> str:
    """One row a room, from the top floor down."""
    rows = ["| floor | room | what it knows |", "|---|---|---|"]
    for number, rooms in enumerate(reversed(floors())):
        rows[2:2] = [f"| {number} | `{room}` | {said_of(room)} |" for room in rooms]
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    """CONTRIBUTING.md with the table as it should be."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
