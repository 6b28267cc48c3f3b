"""What `vitprune bench` is asked for.

Knows the defaults, and that a checkpoint alone stands for the smallest recipe. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from vitprune.recipe.errors import Place
from vitprune.recipe.schema import Recipe, load_recipe
from vitprune.recipe.values import Fraction
from vitprune.recipe.yaml_source import Source

TARGETS = (0.8, 0.65, 0.5, 0.35)
BATCH_SIZES = (1, 16)
TRAINING_BATCH_SIZE = 16

Mode = Literal["eager", "compiled"]
DtypeName = Literal["float32", "bfloat16", "float16"]

_NO_DATA = "random-pixels"


@dataclass(frozen=True)
class BenchSettings:
    """A sweep: every image size by dtype, mode, batch size and target.

    recipe: its model, data, pruning and seed are what is measured; its budget isn't. random_pixels: the recipe has no
    data; images are seeded noise. targets: parts of the dense MACs to calibrate to; None: `TARGETS`, or no others
    where the model or the recipe has thresholds of its own, which are always measured. dtypes: none: the recipe's.
    image_sizes: none: the size that the checkpoint's image processor gives. calibration_images: a calibration for each
    image size, dtype and target is slow, so few.
    """

    recipe: Recipe
    random_pixels: bool = False
    targets: tuple[float, ...] | None = None
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    dtypes: tuple[DtypeName, ...] = ()
    image_sizes: tuple[int, ...] = ()
    modes: tuple[Mode, ...] = ("eager",)
    repeats: int = 7
    calibration_images: int = 64
    training: bool = False
    training_batch_size: int = TRAINING_BATCH_SIZE


def read_part(text: str) -> float:
    """A part of the MACs as people write it, 65% or 0.65. Raises ValueError with the way out."""
    try:
        return TypeAdapter(Fraction).validate_python(text)
    except ValidationError as error:
        raise ValueError(str(error.errors()[0].get("ctx", {}).get("error", f"is {text!r}"))) from None


def is_recipe(target: str) -> bool:
    """Whether a command's target is a recipe file rather than a checkpoint."""
    return Path(target).suffix in (".yaml", ".yml")


def with_data(data: str | None, overrides: Sequence[str]) -> list[str]:
    """The overrides of a recipe that is given other data: its configuration isn't theirs."""
    if data is None:
        return [*overrides]
    return ["data.name=null", *overrides, f"data.path={json.dumps(data, ensure_ascii=False)}"]


def read_target(target: str, data: str | None, overrides: Sequence[str] = ()) -> tuple[Recipe, bool]:
    """The recipe that a target stands for, and whether its images are to be random pixels.

    target: a recipe file; or folder or Hub id of a checkpoint, which needs `data` for real images. overrides:
    `key.path=value` strings. Raises RecipeError with everything that is wrong.
    """
    if is_recipe(target):
        return load_recipe(target, with_data(data, overrides)), False
    place = Place(target)
    tree: dict[str, Any] = {
        "version": 1,
        "model": {"checkpoint": target},
        "data": {"path": data or _NO_DATA},
        "budget": {"macs": 1.0},
    }
    source = Source(tree, {(): place, ("model", "checkpoint"): place, ("data", "path"): Place(f"--data {data}")})
    for override in overrides:
        source.override(override)
    here = (Path.cwd(),)
    recipe = source.validate(Recipe, {"checkpoint": here, "path": here, "label_names": here})
    return recipe, recipe.data.path == _NO_DATA
