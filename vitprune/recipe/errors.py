"""What is wrong with a recipe, where, and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, Self, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Key = tuple[str | int, ...]


def first_line(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


WORD, LIST = "(word)", "(list)"
"""Tags of the branches of a union, which Pydantic adds to the place of an error and which no reader should see."""


@dataclass(frozen=True)
class Place:
    """A line of a file, or an override as it was typed."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


class Problem(NamedTuple):
    """What is wrong with one key. The empty key is the whole recipe."""

    key: Key
    text: str
    place: Place | None = None

    def __str__(self) -> str:
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.key).lstrip(".")
        return ": ".join(str(part) for part in (self.place, key, self.text) if part)


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, one line each: `file:line: key.path: what is wrong`."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def at(cls, key: Key, text: str, place: Place | None = None) -> Self:
        """One thing that is wrong, with one key."""
        return cls([Problem(key, text, place)])


@contextmanager
def concerning(*key: str) -> Iterator[None]:
    """Say of a ValueError inside which key of the recipe it is about."""
    try:
        yield
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError.at(key, str(error)) from error


@contextmanager
def unkeyed() -> Iterator[None]:
    """Say a RecipeError without its keys, where no recipe was written."""
    try:
        yield
    except RecipeError as error:
        raise ValueError("\n".join(problem.text for problem in error.problems)) from error


def show(value: object) -> str:
    """A value as an error message names it."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case Mapping():
            return "a section"
        case list() | tuple():
            return "a list"
        case str() if len(value) > 60:
            return repr(value[:57] + "...")
        case _:
            return repr(value)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known name is near."""
    return "".join(f" (did you mean {near!r}?)" for near in get_close_matches(name.lower(), known, n=1))


def problems_of(error: ValidationError, spec: type[BaseModel]) -> list[Problem]:
    """What Pydantic refused of a `spec`, each with its key."""
    found = []
    for detail in error.errors(include_url=False):
        key: Key = tuple(part for part in detail["loc"] if part not in (WORD, LIST))
        found.append(Problem(key, _explain(detail, key, spec)))
    return found


def _explain(error: ErrorDetails, key: Key, spec: type[BaseModel]) -> str:
    """What Pydantic refused at `key` of a `spec`, in plain words and with the way out."""
    value, limits = error["input"], error.get("ctx", {})
    match error["type"]:
        case "value_error":
            return str(limits["error"])
        case "missing":
            return f"is missing; {_section(spec, key[:-1]).model_fields[str(key[-1])].description}".rstrip(".")
        case "extra_forbidden":
            return _unknown(str(key[-1]), key[:-1], spec)
        case "literal_error":
            known = re.findall(r"'([^']*)'", limits["expected"]) or [limits["expected"]]
            near = did_you_mean(value, known) if isinstance(value, str) else ""
            return f"is {show(value)}, should be {limits['expected']}{near}"
        case "model_type":
            how = "write its keys below it, indented, or leave it out" if value is None else "write `key: value` lines"
            return f"should be a section, not {show(value)}; {how}"
        case "tuple_type":
            return f"should be a list such as [a, b], not {show(value)}"
        case "int_type":
            return f"should be a whole number, not {show(value)}"
        case "float_type":
            return f"should be a number, not {show(value)}"
        case "finite_number":
            return f"should be a finite number, not {show(value)}"
        case "bool_type":
            return f"should be true or false, not {show(value)}"
        case "string_type":
            quotes = "; put it in quotes" if isinstance(value, int | float) else ""
            return f"should be text, not {show(value)}{quotes}"
        case "string_too_short":
            return "is empty; write a name or leave the key out"
        case _:
            return f"is {show(value)}, {error['msg'].removeprefix('Input ')}"


def _unknown(name: str, parent: Key, spec: type[BaseModel]) -> str:
    known = list(_section(spec, parent).model_fields)
    if near := did_you_mean(name, known):
        return f"unknown key{near}"
    elsewhere = [path for path in _paths(spec) if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"unknown key (did you mean {' or '.join(map(repr, elsewhere))}?)"
    return f"unknown key; known here are {', '.join(known)}"


def _section(spec: type[BaseModel], key: Key) -> type[BaseModel]:
    for name in key:
        if isinstance(name, int):  # of a list, whose sections are all of one kind
            continue
        nested = _nested(spec.model_fields[name].annotation)
        assert nested is not None
        spec = nested
    return spec


def _nested(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for kind in get_args(annotation) if (found := _nested(kind)) is not None), None)


def _paths(spec: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in spec.model_fields.items():
        yield prefix + name
        nested = _nested(info.annotation)
        if nested is not None:
            yield from _paths(nested, f"{prefix}{name}.")
