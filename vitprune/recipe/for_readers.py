"""What others may see of a recipe: of local paths no more than the last part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitprune.recipe.schema import Recipe


def for_readers(recipe: Recipe) -> dict[str, Any]:
    """A recipe as others may see it: of local paths the last part alone, behind "./"."""
    shown = recipe.model_dump(mode="json")
    for section, key in _PATHS:
        value = shown[section][key]
        if isinstance(value, str) and (_is_local(value) or section == "output"):
            shown[section][key] = f"./{Path(value).name}"
    return shown


def without_paths(text: str, recipe: Recipe) -> str:
    """What is said of a run, with no local path of its recipe in it."""
    values = [recipe.model_dump(mode="json")[section][key] for section, key in _PATHS]
    # what has no name of its own, such as ".", is a part of many words
    paths = (v for v in values if isinstance(v, str) and _is_local(v) and Path(v).name)
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return text


_PATHS = (("model", "checkpoint"), ("data", "path"), ("data", "label_names"), ("output", "path"))


def _is_local(path: str) -> bool:
    """Whether a value of a recipe is a path, not a Hub id."""
    return Path(path).is_absolute() or Path(path).exists() or path.startswith((".", "~"))
