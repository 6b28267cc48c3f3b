"""YAML in, a Pydantic model out, and for every problem the line it was written on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.reader import ReaderError

from vitprune.recipe.errors import Key, Place, Problem, RecipeError, problems_of, show

Spec = TypeVar("Spec", bound=BaseModel)


@dataclass
class Source:
    """Plain values, the place of each, and what is already known to be wrong with them."""

    tree: dict[str, Any]
    places: dict[Key, Place]
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> Source:
        """Read a file and set the overrides. Raises RecipeError where there is no map of sections to speak of."""
        tree, places, problems = _parse(_text(path), lambda line: Place(str(path), line))
        if not isinstance(tree, dict):
            what = "is empty" if tree is None else f"holds {show(tree)}"
            text = f"{what}; a recipe is made of sections such as `model:`, `data:` and `budget:`"
            raise RecipeError([*problems, Problem((), text, places[()])])
        source = cls(tree, places, problems)
        for override in overrides:
            source.override(override)
        return source

    def place(self, key: Key) -> Place:
        """Where a key was written; for one that was not, where its parent was."""
        while key not in self.places:
            key = key[:-1]
        return self.places[key]

    def override(self, text: str) -> None:
        """Set one `key.path=value`, the value read as YAML. Sections that are missing are made."""
        place = Place(f"--set {text}")
        dotted, equals, written = text.partition("=")
        key: tuple[str, ...] = tuple(dotted.strip().split("."))
        if not equals or not all(key):
            self.problems.append(Problem((), "write it as key=value, such as finetune.epochs=1", place))
            return
        try:
            value, places, problems = _parse(_whole(written), lambda line: place, key)
        except RecipeError as error:
            self.problems += error.problems
            return
        section = self.tree
        for depth, name in enumerate(key[:-1], start=1):
            if section.get(name) is None:
                section[name] = {}
                self.places[key[:depth]] = place
            if not isinstance(section[name], dict):
                why = f"holds {show(section[name])}, so nothing can be set below it"
                self.problems.append(Problem(key[:depth], why, place))
                return
            section = section[name]
        section[key[-1]] = value
        self.places = {k: p for k, p in self.places.items() if k[: len(key)] != key} | places
        self.problems += problems

    def validate(self, spec: type[Spec], context: object = None) -> Spec:
        """The values as a `spec`. Raises RecipeError with all problems, in the order of the lines."""
        try:
            valid = spec.model_validate(self.tree, context=context)
            found: list[Problem] = []
        except ValidationError as error:
            valid = None
            found = [problem._replace(place=self.place(problem.key)) for problem in problems_of(error, spec)]
        problems = sorted(self.problems + found, key=_reading_order)
        if valid is None or problems:
            raise RecipeError(problems)
        return valid


def dump(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that `Source.read` reads back to equal values."""
    return yaml.dump(
        dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120
    )


def _reading_order(problem: Problem) -> tuple[bool, int]:
    line = problem.place.line if problem.place else None
    return line is None, line or 0


# YAML 1.2's plain scalars. PyYAML's own are YAML 1.1's: `no` would be false, `1e-4` text, `2024-01-01` a date.
_SCALARS = {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]{1,18}",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class _Refused(yaml.MarkedYAMLError):
    """Good YAML that has no place in a recipe."""


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(None, None, f"refers to *{event.anchor}; write the value out", event.start_mark)
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _Refused(None, None, f"has the tag {tag}; remove it, values are plain", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Keeps YAML 1.1's own scalars beside ours, so that text which either would misread is put in quotes."""


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), None)


def _parse(text: str, place: Callable[[int], Place], key: Key = ()) -> tuple[Any, dict[Key, Place], list[Problem]]:
    """Plain values, their places, and the problems that don't keep the rest from being read."""
    try:
        node = _Loader(text).get_single_node()
        reader = _Reader(place, {key: place(node.start_mark.line + 1 if node else 1)})
        return reader.plain(node, key), reader.places, reader.problems
    except yaml.YAMLError as error:
        line, why = _syntax(error, text)
    except RecursionError:
        line, why = 1, "is nested too deeply"
    raise RecipeError.at(key, why, place(line))


@dataclass
class _Reader:
    place: Callable[[int], Place]
    places: dict[Key, Place]
    problems: list[Problem] = field(default_factory=list)

    def plain(self, node: yaml.Node | None, key: Key) -> Any:
        match node:
            case yaml.MappingNode():
                return self._section(node, key)
            case yaml.SequenceNode():
                for index, child in enumerate(node.value):
                    self.places[(*key, index)] = self.place(child.start_mark.line + 1)
                return [self.plain(child, (*key, index)) for index, child in enumerate(node.value)]
            case yaml.ScalarNode():
                return _scalar(node.tag, node.value)
            case _:
                return None

    def _section(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        section: dict[str, Any] = {}
        for name, child in node.value:
            here = self.place(name.start_mark.line + 1)
            below = (*key, str(name.value))
            if not isinstance(name, yaml.ScalarNode):
                self.problems.append(Problem(key, "has a key that is not a word", here))
            elif name.value in section:
                text = f"is written twice, first at {self.places[below]}; keep one"
                self.problems.append(Problem(below, text, here))
            else:
                self.places[below] = here
                section[name.value] = self.plain(child, below)
        return section


def _whole(written: str) -> str:
    """An override's value; plain text in which YAML would see a comment is put in quotes."""
    text = written.strip()
    is_plain = text[:1] not in tuple("[{\"'|>&*!")
    return json.dumps(text, ensure_ascii=False) if is_plain and re.search(r"(^|\s)#", text) else written


def _scalar(tag: str, text: str) -> str | int | float | bool | None:
    match tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text)
        case "float":
            return float(re.sub(r"\.(?=[inIN])", "", text))
        case _:
            return text


def _syntax(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """The line of a syntax error and what to do about it."""
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return line, f"holds the unprintable character {chr(error.character)!r}; is this a recipe?"
    if not isinstance(error, yaml.MarkedYAMLError):
        return 1, f"is not YAML: {error}"
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    here = lines[line - 1] if line <= len(lines) else ""
    problem = error.problem or error.context or "it cannot be read"
    if isinstance(error, _Refused):
        return line, problem
    if "\t" in here[: len(here) - len(here.lstrip())] or "'\\t'" in problem:
        return line, "is indented with a tab; YAML wants spaces"
    if problem == "mapping values are not allowed here":
        return line, "has a ':' where none can be; check the indentation, and put text that holds ': ' in quotes"
    if "but found another document" in problem:
        return line, "starts a second document ('---'); a recipe is one"
    return line, f"is not YAML: {problem}; check brackets, quotes and indentation, here and just above"


def _text(path: Path) -> str:
    place = Place(str(path))
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start}); is this a recipe?"
    except FileNotFoundError:
        problem = "there is no such file; `vitprune recipes ls` shows the recipes that come with vitprune"
    except IsADirectoryError:
        problem = "is a folder; name the recipe file in it"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    raise RecipeError.at((), problem, place)
