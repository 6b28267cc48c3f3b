"""What all sections of a recipe have in common: frozen, strict, no unknown keys."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    StringConstraints,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)

from vitprune.recipe.errors import LIST, WORD, RecipeError, problems_of, show


class Spec(BaseModel):
    """A section of a recipe; the text under a key says what it means."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


LARGEST_FLOAT32 = 3.4e38
_FILE_SUFFIXES = frozenset(
    [".parquet", ".arrow", ".csv", ".json", ".jsonl", ".yaml", ".yml", ".zip", ".tar", ".safetensors", ".bin", ".pt"]
)


def _number(value: object) -> object:
    """Take a number in quotes for what it is."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", value) else value


def _part(allowed: Callable[[float], bool], words: str) -> BeforeValidator:
    """65 %, "65%" and 0.65 are one; a bare 65 is not guessed at."""

    def read(value: object) -> object:
        percent = re.fullmatch(r"([-+]?\d+(?:\.\d+)?) ?%", value) if isinstance(value, str) else None
        part = float(percent[1]) / 100 if percent else _number(value)
        if isinstance(part, str):
            raise ValueError(f"is {part!r}, should be a part such as 65% or 0.65")
        if isinstance(part, bool) or not isinstance(part, int | float):
            return part
        if not percent and 1 < part <= 100:
            raise ValueError(f"is {part:g}; write {part:g}% or {part / 100:g}")
        if not allowed(part):
            raise ValueError(f"is {value}, should be {words}")
        return part

    return BeforeValidator(read)


def _expanded(value: str) -> str:
    """`~` and environment variables of a path as a shell has them; what is there by that very name is meant so."""
    if os.path.exists(value):
        return value
    expanded = os.path.expanduser(os.path.expandvars(value))
    if unset := re.search(r"\$\{?([A-Za-z_]\w*)", expanded):
        raise ValueError(f"is {value!r}, but no environment variable {unset[1]} is set; set it, or write the path out")
    return expanded


def _existing(value: str, info: ValidationInfo) -> str:
    """A local path as an absolute one, a Hub id as it is. Without folders to look in (Python API) both as they are."""
    written, value = value, _expanded(value)
    folders: Mapping[str, Sequence[Path]] | None = info.context
    if folders is None or "://" in value:
        return value
    places = [os.path.abspath(folder / value) for folder in folders[str(info.field_name)]]
    for place in places:
        if os.path.exists(place):
            return place
    if value.startswith((".", "/")) or value.count("/") > 1 or Path(value).suffix in _FILE_SUFFIXES:
        looked = " or ".join(dict.fromkeys(places))
        raise ValueError(f"{written!r} is not there; looked for {looked}")
    return value


def _either(*words: str, form: str) -> Discriminator:
    def branch(value: object) -> str | None:
        return WORD if value in words else LIST if isinstance(value, list | tuple) else None

    message = f"should be {', '.join(map(repr, words))} or a list {form}"
    return Discriminator(branch, custom_error_type="wrong_form", custom_error_message=message)


_PERCENT_OR_PART = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "pattern": r"^(\d+(\.\d+)? ?%|[01]|[01]?\.\d+)$"},
    ]
}

Text = Annotated[str, StringConstraints(min_length=1)]
LocalPath = Annotated[Text, AfterValidator(_expanded)]
LocalFile = Annotated[Text, AfterValidator(_existing)]
HubOrLocal = Annotated[Text, AfterValidator(_existing)]


def _name_or_id(value: object) -> object:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"should be a name or the id of a class, not {show(value)}")
    return value


NameOrId = Annotated[str | int, BeforeValidator(_name_or_id)]
PairsOrFile = Annotated[
    Annotated[dict[str, NameOrId], Tag(LIST)] | Annotated[LocalFile, Tag(WORD)],
    Discriminator(
        lambda value: LIST if isinstance(value, Mapping) else WORD if isinstance(value, str) else None,
        custom_error_type="wrong_form",
        custom_error_message="should be pairs {name: the checkpoint's name or id}, or a YAML or JSON file of them",
    ),
]
Positive = Annotated[float, Field(gt=0), BeforeValidator(_number)]
NonNegative = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Fraction = Annotated[
    float, _part(lambda part: 0 < part <= 1, "above 0% and at most 100%"), WithJsonSchema(_PERCENT_OR_PART)
]
"""A part of a whole, not nothing: 65%, "65 %" or 0.65."""
_One = Annotated[Fraction, Tag(WORD)]
_Several = Annotated[Sequence[Fraction], AfterValidator(tuple), Tag(LIST)]
Fractions = Annotated[_One | _Several, Discriminator(lambda value: LIST if isinstance(value, list | tuple) else WORD)]
"""One such part, or a list of them."""
Part = Annotated[
    float, _part(lambda part: 0 <= part < 1, "at least 0% and below 100%"), WithJsonSchema(_PERCENT_OR_PART)
]
"""A part of a whole, not all of it."""

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_DURATION = r"(\d+(?:\.\d+)?) ?(s|min|h)"


def seconds(duration: str) -> float:
    """15min, 2h or 30 s as a number of seconds."""
    found = re.fullmatch(_DURATION, duration)
    assert found is not None
    return float(found[1]) * _UNITS[found[2]]


def _interval(value: object) -> object:
    steps = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if steps or (isinstance(value, str) and re.fullmatch(_DURATION, value) and seconds(value) > 0):
        return value
    raise ValueError(f"is {value!r}, should be a number of steps such as 500, or a time such as 15min")


Interval = Annotated[
    int | str,
    BeforeValidator(_interval),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": f"^{_DURATION}$"}]}),
]
"""Every so many steps, or after a time."""

LISTS_TOO = Field(strict=False)
"""For tuples: a list will do as well."""

# Typed as sequences, so that type checkers let Python users write lists too. What is stored is always a tuple.
_AutoOrEvery = Annotated[Literal["auto", "every"], Tag(WORD)]
_Calibrated = Annotated[Literal["calibrated"], Tag(WORD)]
_Ints = Annotated[Sequence[PositiveInt], AfterValidator(tuple), Tag(LIST)]


def _float32(value: float) -> float:
    """What a threshold can be: beyond it is infinite, and then tokens leave that always stay."""
    if value > LARGEST_FLOAT32:
        raise ValueError(f"has {value:g}, but a threshold is at most {LARGEST_FLOAT32:g}")
    return value


_Float32 = Annotated[NonNegative, AfterValidator(_float32)]
_Numbers = Annotated[Sequence[_Float32], AfterValidator(tuple), Tag(LIST)]
_Fractions = Annotated[Sequence[Fraction], AfterValidator(tuple), Tag(LIST)]

Blocks = Annotated[_Ints | _AutoOrEvery, _either("auto", "every", form="of block numbers such as [4, 7, 10]")]
Thresholds = Annotated[_Numbers | _Calibrated, _either("calibrated", form="with a number for every stage")]
KeepRatios = Annotated[_Fractions | _Calibrated, _either("calibrated", form="with a part such as 65% for every stage")]


def read_budget(budget: float | str) -> float:
    """A part of the dense model's cost, as a number. Raises ValueError for what is none."""
    try:
        return _FRACTION.validate_python(budget)
    except ValidationError:
        text = f"budget is {budget!r}, should be a part of the dense MACs above 0 and at most 1, such as 0.65 or '65%'"
        raise ValueError(text) from None


_FRACTION = TypeAdapter[float](Fraction)
AnySpec = TypeVar("AnySpec", bound=Spec)


def as_spec(kind: type[AnySpec], given: AnySpec | Mapping[str, Any]) -> AnySpec:
    """A spec, also from a mapping of its keys. Raises RecipeError for values that don't fit, TypeError for neither."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"{type(given).__name__} is no {kind.__name__}; pass one, or a dict of its keys")
    try:
        return kind.model_validate(dict(given), strict=False)
    except ValidationError as error:
        raise RecipeError(problems_of(error, kind)) from error
