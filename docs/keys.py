"""Writes docs/recipe.md, all keys of a recipe, from its schema: python docs/keys.py"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitprune.recipe.schema import json_schema

PAGE = Path(__file__).with_name("recipe.md")
HEAD = """# All keys of a recipe

Written from the schema by `python docs/keys.py`; `vitprune schema` prints it for editors. A key without a default has
to be there. `--set key=value` sets any of them from the command line. Paths may have `~` and environment variables;
local ones are seen from the recipe's folder, then from where the command runs, `output.path` from where it runs.
"""
WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "nothing"}


def page() -> str:
    schema = json_schema()
    return "\n".join([HEAD, *_sections(schema, schema, "")])


def _sections(
    schema: dict[str, Any], section: dict[str, Any], path: str, given: dict[str, Any] | None = None
) -> Iterator[str]:
    """A table of the section, then those of the sections in it. given: its own default, for keys that have none."""
    inner = []
    if path:
        yield f"## `{path}`\n\n{section.get('description', '')}\n"
    yield "| key | what it may be | default | what it means |\n|---|---|---|---|"
    for key, field in section["properties"].items():
        refers = _section_of(schema, field)
        if refers is not None:
            inner.append((f"{path}.{key}".lstrip("."), refers, field.get("default")))
        field = {"default": given[key], **field} if given and key in given else field
        kind = "a section" if refers is not None else _kind(schema, field)
        meaning = " ".join((field.get("description") or (refers or {}).get("description", "")).split())
        yield f"| `{key}` | {kind} | {_default(field, refers)} | {meaning.replace('|', chr(92) + '|')} |"
    yield ""
    for name, refers, default in inner:
        yield from _sections(schema, refers, name, default)


def _section_of(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a field holds, if it holds one."""
    for option in (field, *field.get("anyOf", ())):
        if "$ref" in option:
            found: dict[str, Any] = schema["$defs"][option["$ref"].rpartition("/")[2]]
            return found if "properties" in found else None
    return None


def _kind(schema: dict[str, Any], field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    options = field.get("anyOf") or field.get("oneOf")
    if options:
        kinds = [_kind(schema, option) for option in options if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "pattern" in field and "%" in field["pattern"]:
        return "a part, as 65%"
    if "$ref" in field:
        return "map"
    match field.get("type"):
        case "array":
            return f"list of: {_kind(schema, field.get('items', {}))}"
        case "object":
            return "map"
        case kind:
            return WORDS.get(str(kind), "value")


def _default(field: dict[str, Any], section: dict[str, Any] | None) -> str:
    if "default" not in field:
        return ""
    value = field["default"]
    if value is None:
        return "left out"
    return "its defaults" if section is not None else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
