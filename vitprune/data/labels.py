"""The data's labels as the checkpoint's classes: by name, whatever order they come in, or by number; and as numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vitprune.recipe.errors import RecipeError, did_you_mean
from vitprune.recipe.schema import Task

SHOWN = 20  # names that an error shows
_WORDNET = re.compile(r"n\d{8}")
_WAYS_OUT = (
    "Say which class is which in data.label_names ({name in the data: name or id in the checkpoint}), correct "
    "`id2label` in the checkpoint's config.json, take a checkpoint made for this data, or leave the labels out with "
    "data.labels: ignore"
)


@dataclass(frozen=True)
class Classes:
    """A checkpoint's classes, found by the names that data has for them.

    names: by id. given: what a recipe says of names that the data has, as a name or an id of the checkpoint.
    """

    names: Mapping[int, str]
    given: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def are_unnamed(self) -> bool:
        """Whether the checkpoint was never given names: LABEL_0, LABEL_1, …"""
        return all(name == f"LABEL_{index}" for index, name in self.names.items())

    def id_of(self, name: str) -> int:
        """The id of a class by the data's name for it. Raises ValueError where there is none, or several."""
        meant, found = self.given.get(name, name), self.ids_of(name)
        if isinstance(meant, int):
            if meant not in self.names:
                text = f"{name!r} is given the id {meant}, which the checkpoint hasn't"
                raise RecipeError.at(("data", "label_names"), text)
            return meant
        if len(found) > 1:
            raise ValueError(
                f"{name!r} is the name of several of the checkpoint's classes (ids {', '.join(map(str, found))}); give "
                f"it one of them in data.label_names, such as {{{name}: {found[0]}}}"
            )
        if not found:
            known = list(self.names.values())
            text = f"is not among the checkpoint's labels: {some(known)}{did_you_mean(meant, known)}"
            if name in self.given:
                text = f"{name!r} is given the name {meant!r}, which {text}"
                raise RecipeError.at(("data", "label_names"), text)
            raise ValueError(f"{name!r} {text}")
        return found[0]

    def ids_of(self, name: str) -> Sequence[int]:
        """All classes that the data's name for one may mean."""
        meant = self.given.get(name, name)
        if isinstance(meant, int):
            return (meant,)
        return self._by_name.get(meant) or self._by_spelling.get(spelling(meant)) or ()

    def is_spelled_otherwise(self, name: str) -> bool:
        """Whether a name is found, but not as the checkpoint writes it."""
        return name not in self.given and name not in self._by_name and spelling(name) in self._by_spelling

    @cached_property
    def _by_name(self) -> dict[str, list[int]]:
        return _grouped((name, index) for index, name in self.names.items())

    @cached_property
    def _by_spelling(self) -> dict[str, list[int]]:
        """A list of names, "tench, Tinca tinca", is each of them, and as a whole before that."""
        whole = _grouped((spelling(name), index) for index, name in self.names.items())
        parts = ((spelling(part), index) for index, name in self.names.items() for part in _listed(name))
        return {**_grouped(parts), **whole}


@dataclass(frozen=True)
class Labels:
    """What a label column holds: class ids of the data, or names; several of them for an image, or numbers.

    ids: of the checkpoint, one for each id of the data; None: they are the same. classes: where the column holds names.
    count: of the checkpoint's classes or outputs, if it has any. names: the data's, by its id. notes: what a user
    should know.
    """

    column: str
    count: int | None
    ids: tuple[int, ...] | None = None
    classes: Classes | None = None
    names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    task: Task = "single-label"

    def read(self, value: Any) -> int | list[float]:
        """What a row's value is for training: a class id, or a number for each of the checkpoint's outputs.

        Raises ValueError for what the checkpoint has no such class or output for.
        """
        if self.task == "single-label":
            return self.id_of(value)
        return self._numbers(value) if self.task == "regression" else self._several(value)

    @property
    def blank(self) -> Tensor:
        """Labels of one image that mean nothing, as a batch has them."""
        single = self.task == "single-label"
        return torch.zeros(1, dtype=torch.long) if single else torch.zeros(1, self.count or 1)

    def id_of(self, value: Any) -> int:
        """The class id of one value. Raises ValueError where the checkpoint has no such class."""
        if self.classes is not None:
            return self.classes.id_of(str(value))
        count = self.count if self.ids is None else len(self.ids)
        if not isinstance(value, int) or value < 0 or (count is not None and value >= count):
            bound = "" if count is None else f", the checkpoint has labels 0 to {count - 1}"
            raise ValueError(f"{value!r} is not a class id{bound}")
        return value if self.ids is None else self.ids[value]

    def _several(self, value: Any) -> list[float]:
        """1 for each label that an image has: of a list of them, or of a 0 or 1 for each of the checkpoint's."""
        assert self.count is not None
        if value is None:
            raise ValueError("the row has no labels (None); where an image has none, write an empty list")
        values = value if isinstance(value, list) else [value]
        if self.classes is None and len(values) == self.count and all(_is_part(one) for one in values):
            places = range(self.count) if self.ids is None else self.ids
            found = dict(zip(places, map(float, values), strict=True))
        elif any(isinstance(one, float) for one in values):
            raise ValueError(f"{len(values)} numbers for {self.count} labels of the checkpoint; give 0 or 1 for each")
        else:
            found = {self.id_of(one): 1.0 for one in values}
        return [found.get(place, 0.0) for place in range(self.count)]

    def _numbers(self, value: Any) -> list[float]:
        values = value if isinstance(value, list) else [value]
        if self.count is not None and len(values) != self.count:
            raise ValueError(f"{len(values)} numbers for {self.count} outputs of the checkpoint")
        for one in values:
            if not isinstance(one, float | int) or not math.isfinite(one):
                raise ValueError(f"{one!r} is no number")
        return [float(one) for one in values]


def _is_part(value: Any) -> bool:
    return isinstance(value, float | int) and 0 <= value <= 1


def match(names: Sequence[str], classes: Classes, column: str, place: str) -> Labels:
    """Labels of a column that knows its classes' names. Raises ValueError where one of them can't be matched."""
    count, theirs = len(classes.names), [classes.names[index] for index in sorted(classes.names)]
    same = Labels(column, count, names=tuple(names))
    if list(names) == theirs and not classes.given:
        return same
    if classes.are_unnamed and not classes.given:
        if len(names) == count:
            return same
        raise ValueError(
            f"{place}: {len(names)} classes in the data, {count} in the checkpoint, which has no names for them "
            f"(LABEL_0, …), so they can't be matched. {_WAYS_OUT}"
        )
    if by_number := _numbers(names, classes):
        return Labels(column, count, ids=by_number, names=tuple(names))
    if len(names) == count and _are_wordnet(names):
        # ImageNet's classes come in the order of these ids
        order = {name: index for index, name in enumerate(sorted(names))}
        note = "The data's classes are WordNet ids; they were taken for the checkpoint's in their order."
        return Labels(column, count, ids=tuple(order[name] for name in names), names=tuple(names), notes=(note,))
    ids = _by_name(names, classes, place)
    return Labels(column, count, ids=ids, names=tuple(names), notes=tuple(_notes(names, classes)))


def _by_name(names: Sequence[str], classes: Classes, place: str) -> tuple[int, ...]:
    ids, lacking = dict[str, int](), list[str]()
    for name in names:
        if not classes.ids_of(name):
            if name in classes.given:
                classes.id_of(name)
            lacking.append(name)
            continue
        try:
            ids[name] = classes.id_of(name)
        except RecipeError:
            raise
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if lacking:
        wordnet = "; WordNet ids are known by their order where all classes are there" if _are_wordnet(lacking) else ""
        raise ValueError(
            f"{place}: {len(lacking)} of the data's {len(names)} classes are not among the checkpoint's "
            f"{len(classes.names)}{wordnet}:\n  data: {some(lacking)}\n  checkpoint: "
            f"{some(list(classes.names.values()))}\n{_WAYS_OUT}."
        )
    twice = _grouped((str(index), position) for position, index in enumerate(ids.values()))
    for index, positions in twice.items():
        if len(positions) > 1:
            both = " and ".join(repr(list(ids)[position]) for position in positions)
            known = classes.names[int(index)]
            raise ValueError(f"{place}: {both} are both the checkpoint's {known!r} (id {index}). {_WAYS_OUT}.")
    return tuple(ids.values())


def _notes(names: Sequence[str], classes: Classes) -> Iterator[str]:
    if len(names) < len(classes.names):
        yield f"The data has {len(names)} of the checkpoint's {len(classes.names)} classes."
    others = [name for name in names if classes.is_spelled_otherwise(name)]
    if others:
        pairs = ", ".join(f"{name!r} for {classes.names[classes.id_of(name)]!r}" for name in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        yield f"Class names that are spelled otherwise were matched: {pairs}{more}."


def _numbers(names: Sequence[str], classes: Classes) -> tuple[int, ...] | None:
    """Folders that are named by number count as numbers, unless the checkpoint's classes have such names."""
    if classes.given or not all(name.isdecimal() for name in names):
        return None
    if any(name.isdecimal() for name in classes.names.values()):
        return None
    ids = tuple(map(int, names))
    return ids if all(index in classes.names for index in ids) and len(set(ids)) == len(ids) else None


def spelling(name: str) -> str:
    """A name without what people write in different ways: case, underscores, hyphens, spaces."""
    return re.sub(r"[\s_\-]+", " ", name).strip().casefold()


def _listed(name: str) -> list[str]:
    return [part for part in name.split(",") if part.strip()]


def _are_wordnet(names: Sequence[str]) -> bool:
    return all(map(_WORDNET.fullmatch, names))


def _grouped(pairs: Iterator[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for key, value in pairs:
        known = found.setdefault(key, [])
        if value not in known:
            known.append(value)
    return found


def some(names: Sequence[str]) -> str:
    """The first of a list of names."""
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")
