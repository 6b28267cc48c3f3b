"""The images of a benchmark: real ones or random pixels, of any size.

Calibrates on training images and times on evaluation images. Real ones of another size are interpolated from the pixel
values that the image processor gives (bicubic, antialiased), so nothing is sharper than it was; random pixels are drawn
at each size.

Tensor suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from vitprune.data.images import load_images
from vitprune.exporting.export import image_shape
from vitprune.models.checkpoint import load_processor
from vitprune.recipe.errors import RecipeError, concerning
from vitprune.recipe.for_readers import for_readers
from vitprune.recipe.schema import Recipe, SplitSpec

RANDOM_PIXELS = "random pixels"


@dataclass(frozen=True)
class BenchImages:
    """Calibration and timed images: functions of the size, (B, C, H, W) float32. described: what they are, in words.

    Of a size they are square; None: as they are, of `height` and `size`, their width.
    """

    described: str
    height: int
    size: int
    calibration: Callable[[int | None], Tensor]
    timed: Callable[[int | None], Tensor]


def random_images(recipe: Recipe, model: PreTrainedModel, calibration: int, timed: int) -> BenchImages:
    """Seeded noise, as an image processor would normalise it; so many of each. size: what the checkpoint processes."""

    def noise(count: int, offset: int) -> Callable[[int | None], Tensor]:
        def at(size: int | None) -> Tensor:
            generator = torch.Generator().manual_seed(recipe.seed + offset)
            return torch.randn(count, *(own if size is None else (own[0], size, size)), generator=generator)

        return at

    try:
        processor = load_processor(recipe.model.checkpoint, recipe.model.revision)
    except ValueError:  # the config may say
        processor = None
    own = image_shape(model, processor)
    return BenchImages(RANDOM_PIXELS, own[1], own[2], noise(calibration, 0), noise(timed, 1))


def real_images(recipe: Recipe, calibration: int, timed: int) -> BenchImages:
    """Random samples of the recipe's training and evaluation images, at most so many of each.

    Those of training are read when they are asked for. Raises ValueError for data that isn't there or has no image.
    """
    train = functools.cache(lambda: _load(recipe, recipe.data.train, calibration))
    eval_BCHW = _load(recipe, recipe.data.eval, timed)
    path = for_readers(recipe)["data"]["path"]
    described = f"{len(eval_BCHW)} images of {path}, split {recipe.data.eval.split}"
    height, width = eval_BCHW.shape[-2:]
    return BenchImages(described, height, width, _resized(train), _resized(lambda: eval_BCHW))


def require_square(images: BenchImages) -> None:
    """Raise ValueError where images as they are aren't."""
    if images.height != images.size:
        text = f"its images are {images.height} × {images.size} px; `vitprune bench` measures square ones of a size of"
        text = f"{text} yours (--image-size), `vitprune evaluate` times them as they are"
        raise RecipeError.at(("model", "checkpoint"), text)


def _load(recipe: Recipe, split: SplitSpec, count: int) -> Tensor:
    processor = load_processor(recipe.model.checkpoint, recipe.model.revision)
    with concerning("data", "path"):
        images = load_images(recipe.data, split, processor, id2label=None, labelled=False, seed=recipe.seed)
        x_BCHW = images.sample(count, recipe.seed).pixels()
        if not len(x_BCHW):
            raise ValueError(f"split '{split.split}' of {recipe.data.path} has no image")
    return x_BCHW


def _resized(read: Callable[[], Tensor]) -> Callable[[int | None], Tensor]:
    def at(size: int | None) -> Tensor:
        x_BCHW = read()
        if size is None or tuple(x_BCHW.shape[-2:]) == (size, size):
            return x_BCHW
        return F.interpolate(x_BCHW, (size, size), mode="bicubic", antialias=True)

    return at
